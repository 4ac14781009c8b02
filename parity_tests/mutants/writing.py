"""Writing: streams, scores, searches and second calls, where what is usually asked does not show a fault."""
