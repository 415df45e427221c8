"""Pretrain ELECTRA text encoders, and finetune them, on Composer and Streaming."""

__version__ = "0.1.0"
