"""Finetuning on the user's own data: readers of files and of data sets of the hub."""
