"""Which socket options, control messages and flags reach the host kernel: a table of (level, name), with how long a
value may be. What is not here is ENOPROTOOPT; above all nothing that carries a pointer, loads a program, or reaches
beyond the sandbox's own sockets. Names and numbers: uapi/linux/{in,in6,tcp,udp,icmp,icmpv6}.h.
"""

from __future__ import annotations

from kvmsentry.syscall import abi_net as abi

SET, GET, BOTH = 1, 2, 3
_INT = 4
_ADDRESS = 136  # struct group_req: index and a sockaddr_storage
_SOURCE = 264  # struct group_source_req

# (level, name): (directions, longest value in bytes)
OPTIONS: dict[tuple[int, int], tuple[int, int]] = {}


def _add(level: int, directions: int, size: int, *names: int) -> None:
    for name in names:
        OPTIONS[level, name] = directions, size


_add(abi.SOL_SOCKET, BOTH, _INT, abi.SO_REUSEADDR, abi.SO_DONTROUTE, abi.SO_BROADCAST, abi.SO_SNDBUF, abi.SO_RCVBUF,
     abi.SO_KEEPALIVE, abi.SO_OOBINLINE, abi.SO_PRIORITY, abi.SO_REUSEPORT, abi.SO_RCVLOWAT, abi.SO_TIMESTAMP,
     abi.SO_TIMESTAMPNS, abi.SO_MARK, abi.SO_TIMESTAMPING, abi.SO_RXQ_OVFL, abi.SO_PEEK_OFF, abi.SO_TIMESTAMP_NEW,
     abi.SO_TIMESTAMPNS_NEW, abi.SO_TIMESTAMPING_NEW, abi.SO_NO_CHECK, abi.SO_DEBUG, abi.SO_SNDBUFFORCE,
     abi.SO_RCVBUFFORCE, abi.SO_SELECT_ERR_QUEUE, abi.SO_BUSY_POLL, abi.SO_PREFER_BUSY_POLL, abi.SO_BUSY_POLL_BUDGET,
     abi.SO_BUF_LOCK, abi.SO_TXREHASH, abi.SO_RCVMARK)  # fmt: skip
_add(abi.SOL_SOCKET, GET, _INT, abi.SO_ERROR, abi.SO_ACCEPTCONN, abi.SO_INCOMING_NAPI_ID)
_add(abi.SOL_SOCKET, BOTH, 8, abi.SO_LINGER, abi.SO_MAX_PACING_RATE)
_add(abi.SOL_SOCKET, BOTH, 16, abi.SO_BINDTODEVICE)
_add(abi.SOL_SOCKET, GET, 36, abi.SO_MEMINFO)

# IP_TOS TTL HDRINCL RECVOPTS PKTINFO MTU_DISCOVER RECVERR RECVTTL RECVTOS FREEBIND TRANSPARENT RECVORIGDSTADDR MINTTL
# NODEFRAG CHECKSUM BIND_ADDRESS_NO_PORT RECVFRAGSIZE RECVERR_RFC4884, MULTICAST_TTL LOOP ALL, UNICAST_IF
_add(abi.SOL_IP, BOTH, _INT, 1, 2, 3, 6, 8, 10, 11, 12, 13, 15, 19, 20, 21, 22, 23, 24, 25, 26, 33, 34, 49, 50)
_add(abi.SOL_IP, GET, _INT, 14)  # IP_MTU
_add(abi.SOL_IP, BOTH, 12, 32)  # IP_MULTICAST_IF: struct ip_mreqn
_add(abi.SOL_IP, SET, 12, 35, 36, 37, 38, 39, 40)  # IP_ADD_MEMBERSHIP ... struct ip_mreqn, ip_mreq_source
_add(abi.SOL_IP, SET, _ADDRESS, 42, 45)  # MCAST_JOIN_GROUP, MCAST_LEAVE_GROUP
_add(abi.SOL_IP, SET, _SOURCE, 43, 44, 46, 47)

# IPV6_CHECKSUM UNICAST_HOPS MULTICAST_IF MULTICAST_HOPS MULTICAST_LOOP MTU_DISCOVER RECVERR V6ONLY MULTICAST_ALL
# RECVERR_RFC4884 RECVPKTINFO RECVHOPLIMIT RECVRTHDR RECVHOPOPTS RECVDSTOPTS RECVPATHMTU DONTFRAG
# RECVTCLASS TCLASS AUTOFLOWLABEL ADDR_PREFERENCES MINHOPCOUNT RECVORIGDSTADDR TRANSPARENT UNICAST_IF RECVFRAGSIZE
# FREEBIND
_add(abi.SOL_IPV6, BOTH, _INT, 7, 8, 16, 17, 18, 19, 23, 25, 26, 29, 31, 49, 51, 53, 56, 58, 60, 62, 66, 67, 70, 72, 73,
     74, 75, 76, 77, 78)  # fmt: skip
_add(abi.SOL_IPV6, GET, _INT, 24)  # IPV6_MTU
_add(abi.SOL_IPV6, SET, 20, 20, 21, 27, 28)  # IPV6_ADD_MEMBERSHIP ... struct ipv6_mreq
_add(abi.SOL_IPV6, SET, 20, 50)  # IPV6_PKTINFO: struct in6_pktinfo
_add(abi.SOL_IPV6, SET, _ADDRESS, 42, 45)
_add(abi.SOL_IPV6, SET, _SOURCE, 43, 44, 46, 47)

# TCP_NODELAY MAXSEG CORK KEEPIDLE KEEPINTVL KEEPCNT SYNCNT LINGER2 DEFER_ACCEPT WINDOW_CLAMP QUICKACK THIN_*
# USER_TIMEOUT FASTOPEN TIMESTAMP NOTSENT_LOWAT SAVE_SYN FASTOPEN_CONNECT FASTOPEN_NO_COOKIE INQ TX_DELAY
_add(abi.SOL_TCP, BOTH, _INT, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 16, 17, 18, 23, 24, 25, 27, 30, 34, 36, 37)
_add(abi.SOL_TCP, GET, 512, 11)  # TCP_INFO
_add(abi.SOL_TCP, BOTH, 16, 13)  # TCP_CONGESTION
_add(abi.SOL_TCP, GET, 20, 26)  # TCP_CC_INFO
_add(abi.SOL_UDP, BOTH, _INT, 1, 101, 102, 103, 104)  # UDP_CORK, NO_CHECK6_TX, NO_CHECK6_RX, SEGMENT, GRO
_add(abi.SOL_UDPLITE, BOTH, _INT, 1, 10, 11)
_add(abi.SOL_RAW, BOTH, _INT, 1)  # ICMP_FILTER
_add(abi.SOL_ICMPV6, BOTH, 32, 1)  # ICMPV6_FILTER

# struct ip_mreqn may be given as struct in_addr or struct ip_mreq; these sizes are at most.

# Control messages that may be sent: IP_TOS, IP_TTL, IP_PKTINFO; IPV6_PKTINFO, HOPLIMIT, TCLASS, DONTFRAG; UDP_SEGMENT
SENT = {
    (abi.SOL_IP, 1): 4, (abi.SOL_IP, 2): 4, (abi.SOL_IP, 8): 12,
    (abi.SOL_IPV6, 8): 12, (abi.SOL_IPV6, 50): 20, (abi.SOL_IPV6, 52): 4, (abi.SOL_IPV6, 67): 4, (abi.SOL_IPV6, 62): 4,
    (abi.SOL_UDP, 103): 2, (abi.SOL_SOCKET, abi.SO_TIMESTAMPING): 4,
}  # fmt: skip

SEND_FLAGS = abi.MSG_OOB | abi.MSG_DONTROUTE | abi.MSG_EOR | abi.MSG_CONFIRM | abi.MSG_MORE | abi.MSG_FASTOPEN
RECV_FLAGS = abi.MSG_OOB | abi.MSG_PEEK | abi.MSG_TRUNC | abi.MSG_ERRQUEUE
