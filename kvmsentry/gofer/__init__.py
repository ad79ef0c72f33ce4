"""The Gofer: host directory trees served to the Sentry over 9P2000.L.

`process.start` forks it, `client.Client` is what the Sentry speaks to; `p9` holds the messages, `nodes` how names
become host files without leaving the tree, `server` what each message does.
"""
