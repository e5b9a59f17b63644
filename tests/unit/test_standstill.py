"""What the lab takes for a guest that stands still."""

from __future__ import annotations

from lab.standstill import find_still

# As ftrace writes it; the first is of a guest that stood still.
LINE = (
    "       CPU 0/KVM-{thread}     [000] d..1.  1290.177275: kvm_exit: vcpu 0 reason {reason} rip {place}"
    " info1 0x0000000000000000 info2 0x0000000000000000 intr_info 0x00000000 error_code 0x00000000\n"
)


def lines(thread: int, *places: str, reason: str = "interrupt", count: int = 40) -> str:
    each = (places[number % len(places)] for number in range(count))
    return "".join(LINE.format(thread=thread, reason=reason, place=place) for place in each)


def test_only_a_vcpu_that_nothing_but_the_host_interrupts_is_looked_at() -> None:
    trace = "# tracer: nop\n#\n" + lines(968, "0xffffffffb64cb100", "0xffffffffb64cb0fe")
    trace += lines(970, "0xffffffff81000010", reason="hlt")  # idle
    trace += lines(971, *(f"0xffffffff8100{number:04x}" for number in range(30)))  # busy
    trace += lines(972, "0xffffffff81000010", count=5)  # hardly there
    trace += lines(973, "0xffffffff81000010") + lines(973, "0xffffffff81000010", reason="npf", count=1)
    found = find_still(trace)
    assert found[968] == {"0xffffffffb64cb100", "0xffffffffb64cb0fe"}
    assert set(found) == {968, 971}
    assert len(found[971]) == 30
