"""Timing: worker processes, alternating rounds, the protocol, the fastest FP32 engine."""
