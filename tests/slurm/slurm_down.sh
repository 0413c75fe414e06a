#!/usr/bin/env bash
# Ends the Slurm that slurm_up.sh started, its jobs included; --purge removes its configuration, state and logs too.
set -euo pipefail

readonly OURS='# made by fedbench tests/slurm/slurm_up.sh'
readonly CONF=/etc/slurm/slurm.conf LIB=/var/lib/fedbench-slurm PIDS=/run/fedbench-slurm LOGS=/var/log/fedbench-slurm

end() {  # NAME: the daemon that slurm_up.sh recorded under this name, and no other
    local pid left=50
    pid=$(cat "$PIDS/$1.pid" 2>/dev/null) || return 0
    if [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ]; then
        kill "$pid"
        while kill -0 "$pid" 2>/dev/null && ((left-- > 0)); do sleep 0.2; done
        kill -9 "$pid" 2>/dev/null || true
    fi
    rm -f "$PIDS/$1.pid"
}

if ! grep -qsF "$OURS" "$CONF"; then
    echo 'slurm_down: no Slurm of slurm_up.sh is here, nothing done'
    exit 0
fi
[ "$(id -u)" = 0 ] || { echo 'slurm_down: run it as root' >&2; exit 1; }
if timeout 5 scontrol ping 2>/dev/null | grep -q 'is UP'; then
    timeout 10 squeue -h -o %A | sort -u | xargs -r timeout 10 scancel || true
    for _ in $(seq 50); do [ -n "$(timeout 5 squeue -h)" ] || break; sleep 0.2; done
fi
for name in slurmd slurmctld munged; do end "$name"; done
[ "${1:-}" != --purge ] || rm -rf "$CONF" "$LIB" "$PIDS" "$LOGS"
echo 'slurm_down: down'
