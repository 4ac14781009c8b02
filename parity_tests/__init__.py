"""Tests of both twins against the contract, outside witnesses and each other."""
