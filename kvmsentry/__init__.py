"""Run container images inside KVM, with a Linux-compatible kernel written in Python."""

__version__ = "0.1.0"
