# vmsilo. `make help` lists the targets.
PREFIX ?= /usr/local
DESTDIR ?=
LIBDIR ?= $(PREFIX)/lib/vmsilo
DOCDIR ?= $(PREFIX)/share/doc/vmsilo
UNITDIR ?= /usr/lib/systemd/system
PYTHON ?= /usr/bin/python3
INITRAMFS_HOOK := /usr/share/initramfs-tools/hooks/vmsilo-pci
DRACUT_MODULE := /usr/lib/dracut/modules.d/90vmsilo-pci

CACHE := .cache
VENV := $(CACHE)/venv
RUN := $(VENV)/bin

# What the product needs from Debian (README names the same); then what its tests and the container host need.
RUNTIME_PACKAGES := python3-venv python3-gi python3-pydbus python3-systemd python3-cairo gir1.2-glib-2.0 \
	dbus polkitd mmdebstrap erofs-utils nftables e2fsprogs
# Debian 12 has no virtiofsd (VMs there share no directories).
RUNTIME_PACKAGES += $(shell . /etc/os-release; [ "$$VERSION_ID" = 12 ] || echo virtiofsd)
TEST_PACKAGES := systemd-container openssh-client util-linux iproute2 busybox-static cpio

CLIENTS := vm-run vm-shell vm-start vm-stop vm-start-debug vmsilo
STDLIB_PROGRAMS := vmsilo-relayd:vmsilo_relay.__main__ vmsilo-consoled:vmsilo_console.__main__ \
	vmsilo-forward:vmsilo_forward.__main__ vmsilo-share:vmsilo_share.__main__ \
	vmsilo-launch:vmsilo_launch.launch vmsilo-pci-claim:vmsilod.pci.early
VENV_PROGRAMS := vmsilod:vmsilod.main vmsilo-check:vmsilod.config.check vmsilo-image:vmsilo_image.__main__

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

packages: ## install the Debian packages that tests and demo need (root)
	@missing=$$(dpkg-query -W -f '$${db:Status-Status} $${Package}\n' $(RUNTIME_PACKAGES) $(TEST_PACKAGES) 2>&1 \
		| grep -v '^installed ' || true); \
	if [ -n "$$missing" ]; then apt-get update -q && DEBIAN_FRONTEND=noninteractive \
		apt-get install -y -q --no-install-recommends $(RUNTIME_PACKAGES) $(TEST_PACKAGES); fi

$(VENV)/.made: pyproject.toml
	$(PYTHON) -m venv --system-site-packages $(VENV)
	$(RUN)/pip install -q --no-warn-conflicts 'pydantic>=2.10,<3' 'pyroute2>=0.7.2,<0.10' 'inotify-simple>=1.3.5,<3' \
		'jeepney>=0.8' 'ruff>=0.6' 'mypy>=1.11' 'pytest>=8'
	touch $@

venv: packages $(VENV)/.made

test: venv ## lint, unit, bus, net, host and end-to-end tests, the core of the lab: what CI runs
	$(RUN)/python -m hosts.suite

fast: venv ## lint, unit and bus tests only (two minutes)
	$(RUN)/python -m hosts.suite --fast

lint: venv ## ruff and mypy
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

demo: venv ## install vmsilo in a container host and show a real VM answering vm-run
	$(RUN)/python -m hosts.demo

demo-network: venv ## show what three VMs reach: the internet through NAT, each other, and nothing else
	$(RUN)/python -m hosts.demo_network

demo-storage: venv ## show what a VM keeps and what it forgets: homes, disks, disposables, the current directory
	$(RUN)/python -m hosts.demo_storage

bench: venv ## measure, side by side in one run; see docs/performance.md
	$(RUN)/python -m bench

shell: venv ## a root shell in the container host with vmsilo installed
	$(RUN)/python -m hosts.shell

lab-test: venv ## boot a whole virtual host (QEMU, nested KVM) and run the tests that need one; results in .cache/lab
	$(RUN)/python -m hosts.lab

lab-shell: venv ## a root shell in that host with vmsilo installed
	$(RUN)/python -m hosts.lab_shell

lab-bench: venv ## measure beside libvirt and systemd-vmspawn in that host; see docs/performance.md
	$(RUN)/python -m bench.lab

demo-lab: venv ## show VMs on KVM, a NIC passed through, a refused group, a serial login
	$(RUN)/python -m hosts.demo_lab

clean: ## remove everything that tests and demo cached
	$(PYTHON) tests/hosts/clean.py $(CACHE)

install: ## install below PREFIX (root); README says what to do then
	install -d $(DESTDIR)$(LIBDIR)/bin $(DESTDIR)$(LIBDIR)/empty $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(DOCDIR)
	for root in daemon guest; do \
		rm -rf $(DESTDIR)$(LIBDIR)/$$root; cp -r --no-preserve=ownership $$root $(DESTDIR)$(LIBDIR)/$$root; done
	$(PYTHON) -m venv --system-site-packages $(DESTDIR)$(LIBDIR)/venv
	$(DESTDIR)$(LIBDIR)/venv/bin/pip install -q --no-warn-conflicts 'pydantic>=2.10,<3' 'pyroute2>=0.7.2,<0.10' \
		'inotify-simple>=1.3.5,<3' 'jeepney>=0.8'
	for name in $(CLIENTS); do ./systemd/entry client $(LIBDIR) $$name > $(DESTDIR)$(PREFIX)/bin/$$name; \
		chmod 755 $(DESTDIR)$(PREFIX)/bin/$$name; done
	for entry in $(STDLIB_PROGRAMS); do ./systemd/entry stdlib $(LIBDIR) $${entry#*:} > $(DESTDIR)$(LIBDIR)/bin/$${entry%%:*}; \
		chmod 755 $(DESTDIR)$(LIBDIR)/bin/$${entry%%:*}; done
	for entry in $(VENV_PROGRAMS); do ./systemd/entry venv $(LIBDIR) $${entry#*:} > $(DESTDIR)$(LIBDIR)/bin/$${entry%%:*}; \
		chmod 755 $(DESTDIR)$(LIBDIR)/bin/$${entry%%:*}; done
	sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml > $(DESTDIR)$(LIBDIR)/VERSION
	$(PYTHON) -m compileall -q $(DESTDIR)$(LIBDIR)/daemon $(DESTDIR)$(LIBDIR)/guest
	install -d $(DESTDIR)$(UNITDIR) $(DESTDIR)/usr/lib/sysusers.d $(DESTDIR)/usr/lib/tmpfiles.d \
		$(DESTDIR)/usr/share/dbus-1/system.d $(DESTDIR)/usr/share/dbus-1/system-services \
		$(DESTDIR)/usr/share/polkit-1/actions $(DESTDIR)/etc/vmsilo/vms.d
	for unit in vmsilod.service vmsilo-relayd.service vmsilo-consoled.service vmsilo-pci-claim.service; do \
		sed -e 's|@libdir@|$(LIBDIR)|g' -e 's|@docdir@|$(DOCDIR)|g' systemd/$$unit.in > $(DESTDIR)$(UNITDIR)/$$unit; done
	install -m 644 systemd/vmsilod.socket systemd/vmsilo-relayd.socket systemd/vmsilo-consoled.socket \
		systemd/run-vmsilo-hugepages.mount systemd/vmsilo.slice systemd/vmsilo-vms.target systemd/vmsilo-daemons.target $(DESTDIR)$(UNITDIR)/
	if [ "$$(systemctl --version | sed -n '1s/^systemd \([0-9]*\).*/\1/p')" -ge 254 ]; then \
		for daemon in relayd consoled; do install -D -m 644 systemd/vmsilo-$$daemon-preserve.conf \
			$(DESTDIR)$(UNITDIR)/vmsilo-$$daemon.service.d/preserve.conf; done; fi
	install -d $(DESTDIR)$(UNITDIR)/sysinit.target.wants $(DESTDIR)/usr/share/initramfs-tools/hooks \
		$(DESTDIR)$(DRACUT_MODULE)
	ln -sf ../vmsilo-pci-claim.service $(DESTDIR)$(UNITDIR)/sysinit.target.wants/
	sed -e 's|@libdir@|$(LIBDIR)|g' systemd/initramfs-tools/vmsilo-pci.in > $(DESTDIR)$(INITRAMFS_HOOK)
	sed -e 's|@libdir@|$(LIBDIR)|g' systemd/dracut/module-setup.sh.in > $(DESTDIR)$(DRACUT_MODULE)/module-setup.sh
	chmod 755 $(DESTDIR)$(INITRAMFS_HOOK) $(DESTDIR)$(DRACUT_MODULE)/module-setup.sh
	install -m 644 systemd/vmsilo.sysusers.conf $(DESTDIR)/usr/lib/sysusers.d/vmsilo.conf
	install -m 644 systemd/vmsilo.tmpfiles.conf $(DESTDIR)/usr/lib/tmpfiles.d/vmsilo.conf
	install -m 644 systemd/org.vmsilo1.conf $(DESTDIR)/usr/share/dbus-1/system.d/
	sed -e 's|@libdir@|$(LIBDIR)|g' systemd/org.vmsilo1.service.in > $(DESTDIR)/usr/share/dbus-1/system-services/org.vmsilo1.service
	install -m 644 polkit/org.vmsilo1.policy $(DESTDIR)/usr/share/polkit-1/actions/
	install -D -m 644 client/completion/vmsilo.bash $(DESTDIR)/usr/share/bash-completion/completions/vm-run
	for name in vm-shell vm-start vm-stop vm-start-debug vmsilo; do \
		ln -sf vm-run $(DESTDIR)/usr/share/bash-completion/completions/$$name; done
	cp -r --no-preserve=ownership README.md docs $(DESTDIR)$(DOCDIR)/
	# Last before the daemons restart, which must understand it.
	rm -rf $(DESTDIR)$(LIBDIR)/client; cp -r --no-preserve=ownership client $(DESTDIR)$(LIBDIR)/client
	$(PYTHON) -m compileall -q $(DESTDIR)$(LIBDIR)/client
	[ -n "$(DESTDIR)" ] || systemd-sysusers /usr/lib/sysusers.d/vmsilo.conf
	[ -n "$(DESTDIR)" ] || systemd-tmpfiles --create /usr/lib/tmpfiles.d/vmsilo.conf
	[ -n "$(DESTDIR)" ] || [ ! -d /run/systemd/system ] || { systemctl daemon-reload && \
		systemctl reload dbus.service && systemctl try-restart vmsilo-relayd.service vmsilo-consoled.service && \
		systemctl try-restart vmsilod.service; }
	@echo "installed; next: write /etc/vmsilo/vmsilo.toml and a VM below /etc/vmsilo/vms.d (examples: $(DOCDIR)/docs/examples)"

uninstall: ## remove what install put there; configuration and images stay
	[ ! -d /run/systemd/system ] || { systemctl stop 'vmsilo-*-vm.service' 'vmsilo-*-debug.service'; \
		systemctl disable --now vmsilod.socket vmsilo-relayd.socket vmsilo-consoled.socket vmsilod.service \
			vmsilo-relayd.service vmsilo-consoled.service; \
		systemctl stop 'vmsilo-*.socket' vmsilo-vms.target vmsilo-daemons.target run-vmsilo-hugepages.mount; } || true
	[ -n "$(DESTDIR)" ] || [ ! -d $(LIBDIR)/venv ] || { systemctl stop 'vmsilo-*-switch.service' vmsilo.slice; \
		PYTHONPATH=$(LIBDIR)/daemon:$(LIBDIR)/guest $(LIBDIR)/venv/bin/python -c 'from vmsilod.network import batch; \
			batch.settle(batch.NetworkPlan(), frozenset())'; } || true
	[ -n "$(DESTDIR)" ] || rm -rf /run/systemd/system/vmsilo-* /run/vmsilo /run/vmsilo-relay /run/vmsilo-console
	rm -rf $(DESTDIR)$(LIBDIR) $(DESTDIR)$(DOCDIR)
	for name in vm-run vm-shell vm-start vm-stop vm-start-debug vmsilo; do rm -f $(DESTDIR)$(PREFIX)/bin/$$name \
		$(DESTDIR)/usr/share/bash-completion/completions/$$name; done
	for unit in vmsilod.service vmsilo-relayd.service vmsilo-consoled.service vmsilod.socket vmsilo-relayd.socket \
		vmsilo-consoled.socket vmsilo.slice vmsilo-vms.target vmsilo-daemons.target; do \
		rm -f $(DESTDIR)$(UNITDIR)/$$unit; done
	rm -f $(DESTDIR)$(UNITDIR)/run-vmsilo-hugepages.mount
	rm -rf $(DESTDIR)$(UNITDIR)/vmsilo-relayd.service.d $(DESTDIR)$(UNITDIR)/vmsilo-consoled.service.d \
		$(DESTDIR)$(DRACUT_MODULE)
	rm -f $(DESTDIR)$(INITRAMFS_HOOK) $(DESTDIR)$(UNITDIR)/vmsilo-pci-claim.service \
		$(DESTDIR)$(UNITDIR)/sysinit.target.wants/vmsilo-pci-claim.service
	rm -f $(DESTDIR)/usr/lib/sysusers.d/vmsilo.conf $(DESTDIR)/usr/lib/tmpfiles.d/vmsilo.conf \
		$(DESTDIR)/usr/share/dbus-1/system.d/org.vmsilo1.conf \
		$(DESTDIR)/usr/share/dbus-1/system-services/org.vmsilo1.service \
		$(DESTDIR)/usr/share/polkit-1/actions/org.vmsilo1.policy $(DESTDIR)/etc/polkit-1/rules.d/50-vmsilo.rules
	[ ! -d /run/systemd/system ] || systemctl daemon-reload

.PHONY: help packages venv test fast lint demo demo-network demo-storage demo-lab bench lab-bench lab-test lab-shell shell clean install \
	uninstall
export PYTHONPATH := daemon:client:guest:tests
