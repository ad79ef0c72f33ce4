"""What /proc is made of: nodes.py the kinds of files, system.py and net.py what tells of the machine, sysctl.py
/proc/sys,
process.py, memory.py and links.py what tells of processes. The file system itself is kvmsentry/fs/procfs.py."""
