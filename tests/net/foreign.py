"""Rulesets as others load them: the chains, policies and priorities that matter."""

# iptables-nft as dockerd fills it: nothing is forwarded but containers', and those are masqueraded.
DOCKER = """
table ip nat {
	chain DOCKER { iifname "docker0" return; }
	chain PREROUTING {
		type nat hook prerouting priority dstnat; policy accept;
		fib daddr type local jump DOCKER
	}
	chain POSTROUTING {
		type nat hook postrouting priority srcnat; policy accept;
		oifname != "docker0" ip saddr 172.17.0.0/16 masquerade
	}
}
table ip filter {
	chain DOCKER-USER { return; }
	chain FORWARD {
		type filter hook forward priority filter; policy drop;
		jump DOCKER-USER
		oifname "docker0" ct state related,established accept
		iifname "docker0" accept
	}
}
"""

# firewalld: a table of its own; policy accept, and a reject at the end of its chains.
FIREWALLD = """
table inet firewalld {
	chain filter_INPUT {
		type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		iifname "lo" accept
		icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
		ct state invalid drop
		reject with icmpx admin-prohibited
	}
	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept
		ct state invalid drop
		reject with icmpx admin-prohibited
	}
	chain filter_OUTPUT { type filter hook output priority filter + 10; policy accept; }
}
"""

# ufw: iptables-nft, everything that comes in or is forwarded is dropped by policy.
UFW = """
table ip filter {
	chain ufw-before-forward { ct state related,established accept; icmp type echo-request accept; }
	chain INPUT { type filter hook input priority filter; policy drop; ct state related,established accept; }
	chain FORWARD { type filter hook forward priority filter; policy drop; jump ufw-before-forward; }
	chain OUTPUT { type filter hook output priority filter; policy accept; }
}
table ip6 filter {
	chain ufw6-before-forward { ct state related,established accept; }
	chain INPUT {
		type filter hook input priority filter; policy drop;
		ct state related,established accept
		icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
	}
	chain FORWARD { type filter hook forward priority filter; policy drop; jump ufw6-before-forward; }
}
"""

# What a permissive administrator has: everything is accepted, early and late.
OPEN = """
table inet open {
	chain first { type filter hook forward priority -400; policy accept; accept; }
	chain input { type filter hook input priority -400; policy accept; accept; }
	chain last { type filter hook forward priority 400; policy accept; accept; }
	chain translate { type nat hook postrouting priority srcnat; policy accept; oifname "wan" masquerade; }
}
"""

ALL = {"docker": DOCKER, "firewalld": FIREWALLD, "ufw": UFW, "open": OPEN}

# What lets VMs' packets through each of them, once and for all VMs, as the documentation says: 30317 is the
# group of vmsilo's TAPs.
CURES = {
    "docker": "insert rule ip filter DOCKER-USER iifgroup 30317 accept\n"
    "insert rule ip filter DOCKER-USER oifgroup 30317 accept\n",
    "firewalld": "insert rule inet firewalld filter_FORWARD iifgroup 30317 accept\n",
    "ufw": "insert rule ip filter ufw-before-forward iifgroup 30317 accept\n"
    "insert rule ip6 filter ufw6-before-forward iifgroup 30317 accept\n",
    "open": "",
}
