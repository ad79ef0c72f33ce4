"""The benchmark of platforms: what a call, a fault, a process and a whole command cost natively and in sandboxes.

    catalogue   what is measured: a row a figure
    programs    the C programs here, compiled into the cache on first use
    platforms   native, kvm, ptrace and the system's runsc: how a command is run there
    measure     one command under a time limit, nothing left behind
    session     the rounds, interleaved; failures; results as one value that JSON holds
    startup     what starting a sandbox consists of; idle memory
    host        the machine, and what else it did meanwhile
    table, html what is shown

Every figure is a time, lower is better. Nothing here imports click: progress is a callback.
"""
