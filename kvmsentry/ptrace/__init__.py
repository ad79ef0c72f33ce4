"""ptrace: the second platform, for hosts without KVM. `Tracer` is the Platform that kernel and mm know."""
