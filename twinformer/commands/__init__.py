"""The commands of ``twinformer`` that have files of their own."""
