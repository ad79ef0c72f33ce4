"""KVM: the machine, its vCPUs and the channel. `Machine` is the Platform that kernel and mm know."""
