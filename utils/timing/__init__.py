"""Timing: worker processes, alternating rounds, protocol, fastest FP32, choices by latency."""
