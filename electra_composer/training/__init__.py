"""Composer's Trainer for one run: builders, optimizer, callbacks, loggers, devices and parallelism."""
