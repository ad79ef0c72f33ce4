"""/proc/net: tables of the network. Whoever implements sockets (kvmsentry.net) offers the rows of its tables through
`kernel.net.proc(name)`; without it there is a loopback device and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvmsentry.fs.proc.nodes import TextInode, TreeInode
from kvmsentry.kernel.namespaces import Simple

if TYPE_CHECKING:
    from kvmsentry.fs.vfs import SuperBlock
    from kvmsentry.kernel.task import Task

_TCP = (
    "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode"
    "                                                     \n"
)
_TCP6 = (
    "  sl  local_address                         remote_address                        st tx_queue rx_queue "
    "tr tm->when "
    "retrnsmt   uid  timeout inode\n"
)
_UDP = (
    "   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref "
    "pointer drops"
    "             \n"
)
_UDP6 = (
    "  sl  local_address                         remote_address                        st tx_queue rx_queue "
    "tr tm->when "
    "retrnsmt   uid  timeout inode ref pointer drops\n"
)
_IP = (
    "Forwarding DefaultTTL InReceives InHdrErrors InAddrErrors ForwDatagrams InUnknownProtos InDiscards InDelivers "
    "OutRequests OutDiscards OutNoRoutes ReasmTimeout ReasmReqds ReasmOKs ReasmFails FragOKs FragFails FragCreates"
)
_TCP_MIB = (
    "RtoAlgorithm RtoMin RtoMax MaxConn ActiveOpens PassiveOpens AttemptFails EstabResets CurrEstab InSegs OutSegs "
    "RetransSegs InErrs OutRsts InCsumErrors"
)
_UDP_MIB = "InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors InCsumErrors IgnoredMulti MemErrors"


def _mib(name: str, fields: str, first: str = "") -> str:
    names = fields.split()
    values = first.split() + ["0"] * (len(names) - len(first.split()))
    return f"{name}: {fields}\n{name}: {' '.join(values)}\n"


def _dev(task: Task) -> str:
    return (
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo "
        "colls carrier "
        "compressed\n"
        "    lo:       0       0    0    0    0     0          0         0        0       0    0    0    0    "
        " 0       0"
        "          0\n"
    )


DEFAULTS: dict[str, str] = {
    "tcp": _TCP, "tcp6": _TCP6, "udp": _UDP, "udp6": _UDP6, "raw": _UDP, "raw6": _UDP6,
    "unix": "Num       RefCount Protocol Flags    Type St Inode Path\n",
    "route": "Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT"
             "                                                       \n",
    "arp": "IP address       HW type     Flags       HW address            Mask     Device\n",
    "if_inet6": "00000000000000000000000000000001 01 80 10 80       lo\n",
    "ipv6_route": "", "netlink": "sk               Eth Pid        Groups   Rmem     Wmem     Dump  Locks    "
    "Drops    Inode\n",
    "packet": "sk               RefCnt Type Proto  Iface R Rmem   User   Inode\n",
    "protocols": "protocol  size sockets  memory press maxhdr  slab module     cl co di ac io in de sh ss gs "
    "se re sp bi\n",
    "snmp": _mib("Ip", _IP, "2 64") + _mib("Tcp", _TCP_MIB, "1 200 120000 -1") + _mib("Udp", _UDP_MIB)
            + _mib("UdpLite", _UDP_MIB),
    "snmp6": "",
    "netstat": _mib("TcpExt", "SyncookiesSent SyncookiesRecv SyncookiesFailed EmbryonicRsts PruneCalled")
               + _mib("IpExt", "InNoRoutes InTruncatedPkts InMcastPkts OutMcastPkts InBcastPkts OutBcastPkts InOctets"),
    "sockstat": "sockets: used 0\nTCP: inuse 0 orphan 0 tw 0 alloc 0 mem 0\nUDP: inuse 0 mem 0\nUDPLITE: inuse 0\n"
                "RAW: inuse 0\nFRAG: inuse 0 memory 0\n",
    "sockstat6": "TCP6: inuse 0\nUDP6: inuse 0\nUDPLITE6: inuse 0\nRAW6: inuse 0\nFRAG6: inuse 0 memory 0\n",
    "fib_trie": "", "igmp": "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n",
    "ptype": "Type Device      Function\n",
    "wireless": "", "softnet_stat": "",
}  # fmt: skip


def table(name: str) -> Any:
    """The text function of one table: the network stack's own, or the empty table."""

    def show(task: Task) -> str:
        if not isinstance(task.ns.net, Simple):  # a loopback device; its sockets are in no table
            return _dev(task) if name == "dev" else DEFAULTS[name]
        stack = getattr(task.kernel, "net", None)
        offered = getattr(stack, "proc", None)
        made = offered(name) if offered is not None else None
        if made is not None:
            return str(made)
        return _dev(task) if name == "dev" else DEFAULTS[name]

    return show


def build(sb: SuperBlock) -> TreeInode:
    """The directory /proc/PID/net, shared by all: there is one network namespace."""
    return TreeInode(sb, {name.encode(): TextInode(sb, table(name)) for name in ("dev", *DEFAULTS)})
