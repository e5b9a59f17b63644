"""A polkit authority for cases of time and failure, which the real one can't be brought to.

Run as: python stand_in.py ADDRESS. It says yes to root and to nobody and "ask a person" to others, keeps
silent for actions on the VM `zz` and for every interactive question, and fails for the VM `off`.
"""

from __future__ import annotations

import sys

from jeepney import HeaderFields, MessageType, new_error, new_method_return
from jeepney.bus_messages import message_bus
from jeepney.io.blocking import open_dbus_connection

OWNER = 65534  # as in conftest.py


def main() -> None:
    con = open_dbus_connection(sys.argv[1])
    asking = open_dbus_connection(sys.argv[1])  # waiting for a reply drops what else comes on a connection
    con.send_and_get_reply(message_bus.RequestName("org.freedesktop.PolicyKit1"))
    print("ready", flush=True)
    while True:
        message = con.receive()
        if message.header.message_type != MessageType.method_call:
            continue
        if message.header.fields[HeaderFields.member] != "CheckAuthorization":
            con.send(new_method_return(message))
            continue
        (_kind, subject), _action, details, flags, _id = message.body
        if details.get("vm") == "off":
            con.send(new_error(message, "org.freedesktop.PolicyKit1.Error.Failed"))
        elif details.get("vm") != "zz" and flags == 0:
            ask = message_bus.GetConnectionUnixUser(subject["name"][1])
            uid = asking.send_and_get_reply(ask).body[0]
            yes = uid in (0, OWNER)
            con.send(new_method_return(message, "(bba{ss})", ((yes, not yes, {}),)))


if __name__ == "__main__":
    main()
