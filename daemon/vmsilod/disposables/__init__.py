"""Disposables: VMs that are made of a template for one command, or for as long as somebody holds them."""
