"""GLUE: tasks, data, classification head, runs, results and reports."""
