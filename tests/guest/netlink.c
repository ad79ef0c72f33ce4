/* rtnetlink dumps and getifaddrs(3): what is true of lo in every namespace. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static void dump(int type, int reply, const char *what)
{
	struct {
		struct nlmsghdr h;
		struct rtgenmsg g;
	} q = { { NLMSG_LENGTH(sizeof(struct rtgenmsg)), type, NLM_F_REQUEST | NLM_F_DUMP, 7, 0 }, { AF_UNSPEC } };
	struct sockaddr_nl a = { .nl_family = AF_NETLINK }, from;
	socklen_t n = sizeof(a);
	static char buf[65536] __attribute__((aligned(16)));
	int s = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE), lo = 0, done = 0, other = 0;

	bind(s, (struct sockaddr *)&a, n);
	getsockname(s, (struct sockaddr *)&a, &n);
	printf("%s: port %s, send %zd", what, a.nl_pid ? "given" : "none",
	       sendto(s, &q, q.h.nlmsg_len, 0, (struct sockaddr *)&(struct sockaddr_nl){ AF_NETLINK }, sizeof(a)));
	while (!done) {
		n = sizeof(from);
		int got = recvfrom(s, buf, sizeof(buf), 0, (struct sockaddr *)&from, &n);

		for (struct nlmsghdr *h = (void *)buf; NLMSG_OK(h, got); h = NLMSG_NEXT(h, got)) {
			if (h->nlmsg_type == NLMSG_DONE)
				done = 1;
			else if (h->nlmsg_type != reply || h->nlmsg_seq != 7 || from.nl_pid)
				other++;
			else if (type == RTM_GETLINK && ((struct ifinfomsg *)NLMSG_DATA(h))->ifi_index == 1)
				lo++;
			else if (type == RTM_GETADDR && ((struct ifaddrmsg *)NLMSG_DATA(h))->ifa_index == 1)
				lo++;
		}
	}
	printf(", lo %d, strange %d\n", lo, other);
	close(s);
}

int main(void)
{
	struct ifaddrs *all, *i;
	char text[64];

	alarm(30);
	dump(RTM_GETLINK, RTM_NEWLINK, "links");
	dump(RTM_GETADDR, RTM_NEWADDR, "addresses");
	dump(RTM_GETROUTE, RTM_NEWROUTE, "routes");
	getifaddrs(&all);
	for (i = all; i; i = i->ifa_next)
		if (!strcmp(i->ifa_name, "lo") && i->ifa_addr && i->ifa_addr->sa_family == AF_INET)
			printf("lo %s %d\n", inet_ntop(AF_INET, &((struct sockaddr_in *)i->ifa_addr)->sin_addr, text, 64),
			       !!(i->ifa_flags & IFF_UP));
	printf("index %d\n", if_nametoindex("lo"));
	printf("uevent %d\n", socket(AF_NETLINK, SOCK_DGRAM, NETLINK_KOBJECT_UEVENT) > 0);
	return 0;
}
