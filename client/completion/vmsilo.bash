# Bash completion of vm-run, vm-shell, vm-start, vm-stop, vm-start-debug and vmsilo. VM names are those with a command socket.

_vmsilo_names() {
    local socket name
    for socket in /run/vmsilo/*-command.socket; do
        name=${socket##*/}
        name=${name%-command.socket}
        [[ $name =~ ^[a-z][a-z0-9-]{0,30}$ ]] && printf '%s\n' "$name"
    done
}

_vmsilo_words() {
    mapfile -t COMPREPLY < <(compgen -W "$1" -- "${COMP_WORDS[COMP_CWORD]}")
}

_vmsilo_vm_run() {
    local at word here=
    for ((at = 1; at < COMP_CWORD; at++)); do
        word=${COMP_WORDS[at]}
        case $word in
            --cwd | --env | --escapes | --timeout | --name | --template) ((at++)) ;;
            --here) here=yes ;;
            -*) ;;
            *) return ;; # the command and its arguments are the guest's
        esac
    done
    if [[ ${COMP_WORDS[COMP_CWORD - 1]} == --escapes ]]; then
        _vmsilo_words 'colour all'
    elif [[ ${COMP_WORDS[COMP_CWORD]} == -* ]]; then
        _vmsilo_words '--root --detach --no-start --cwd --env --escapes --timeout --help
            --disposable --name --here --ro --network --template --allow-home'
    elif [[ $here && ${COMP_WORDS[COMP_CWORD - 1]} != --template ]]; then
        mapfile -t COMPREPLY < <(compgen -c -- "${COMP_WORDS[COMP_CWORD]}")
    else
        _vmsilo_words "$(_vmsilo_names)"
    fi
}

_vmsilo_vm_shell() {
    local at word command=
    for ((at = 1; at < COMP_CWORD; at++)); do
        word=${COMP_WORDS[at]}
        case $word in
            --escapes) ((at++)) ;;
            --exec | --ssh) command=yes ;;
            -*) ;;
            *) [[ $command ]] && return ;; # the command and its arguments are the guest's
        esac
    done
    if [[ ${COMP_WORDS[COMP_CWORD - 1]} == --escapes ]]; then
        _vmsilo_words 'colour all'
    elif [[ ${COMP_WORDS[COMP_CWORD]} == -* ]]; then
        _vmsilo_words '--read-only --take --no-history --start --log --exec --ssh --root --escapes --help'
    else
        _vmsilo_words "$(_vmsilo_names)"
    fi
}

_vmsilo_vm() {
    local options=--help
    case ${1##*/} in
        vm-start) options='--wait --help' ;;
        vm-stop) options='--force --timeout --help' ;;
        vm-start-debug) options='--escapes --help' ;;
    esac
    if [[ ${COMP_WORDS[COMP_CWORD]} == -* ]]; then
        _vmsilo_words "$options"
    else
        _vmsilo_words "$(_vmsilo_names)"
    fi
}

_vmsilo_vmsilo() {
    if ((COMP_CWORD == 1)); then
        _vmsilo_words 'list status memory check image pci usb network disk version help'
    elif [[ ${COMP_WORDS[1]} == pci && COMP_CWORD -eq 2 ]]; then
        _vmsilo_words 'list claim release'
    elif [[ ${COMP_WORDS[1]} == image && COMP_CWORD -eq 2 ]]; then
        _vmsilo_words 'list build use diff verify rm gc path clean'
    elif [[ ${COMP_WORDS[COMP_CWORD]} == -* ]]; then
        _vmsilo_words '--json'
    elif [[ ${COMP_WORDS[1]} == status ]]; then
        _vmsilo_words "$(_vmsilo_names)"
    elif [[ ${COMP_WORDS[1]} == usb ]]; then
        _vmsilo_usb
    elif [[ ${COMP_WORDS[1]} == network ]]; then
        case $COMP_CWORD in
            2) _vmsilo_words 'list attach detach' ;;
            3) _vmsilo_words "$(_vmsilo_names)" ;;
        esac
    elif [[ ${COMP_WORDS[1]} == disk ]]; then
        case $COMP_CWORD in
            2) _vmsilo_words 'list grow remove' ;;
            3) _vmsilo_words "$(_vmsilo_names)" ;;
        esac
    fi
}

_vmsilo_usb() {
    local devices=/sys/bus/usb/devices
    local addresses
    addresses=$(cd "$devices" 2>/dev/null && compgen -G '[0-9]*-*' | grep -v :)
    case $COMP_CWORD:${COMP_WORDS[2]} in
        2:*) _vmsilo_words 'list attach detach release' ;;
        3:attach) _vmsilo_words "$(_vmsilo_names)" ;;
        3:detach) _vmsilo_words "$(_vmsilo_names) $addresses" ;;
        4:attach | 4:detach | 3:release) _vmsilo_words "$addresses" ;;
    esac
}

complete -o default -F _vmsilo_vm_run vm-run
complete -o default -F _vmsilo_vm_shell vm-shell
complete -F _vmsilo_vm vm-start vm-stop vm-start-debug
complete -F _vmsilo_vmsilo vmsilo
