"""`make bench`: vmsilo beside its floor (the same work with nothing of ours in it), in one run, as ratios.

What each number means and what was found is in docs/performance.md.
"""
