"""Programs that run elsewhere, for the measurements: in the container host or in its guest. Standard library
only, nothing imported from here; each prints one JSON value.
"""
