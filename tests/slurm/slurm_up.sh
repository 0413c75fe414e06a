#!/usr/bin/env bash
# A Slurm of one node on this Debian machine, for the tests: packages, configuration, daemons, one job as proof.
#
#   sudo tests/slurm/slurm_up.sh            bring it up; while it is up already nothing is changed
#   tests/slurm/slurm_up.sh --check         exit 0 where it is up, 3 where it is not
#
# FB_SLURM_CPUS  CPUs that the node claims (16): more than a small machine has, so that small jobs run side by side
# FB_SLURM_MPI   what a bare `srun` starts ranks with, pmix or pmi2 (pmix); `srun --mpi=` reaches both either way
#
# It never touches a Slurm that it did not configure itself. slurm_down.sh ends what it started.
set -euo pipefail

readonly OURS='# made by fedbench tests/slurm/slurm_up.sh'
readonly CONF=/etc/slurm/slurm.conf LIB=/var/lib/fedbench-slurm PIDS=/run/fedbench-slurm LOGS=/var/log/fedbench-slurm
readonly CPUS=${FB_SLURM_CPUS:-16} MPI=${FB_SLURM_MPI:-pmix}
NODE=$(hostname -s)

tell() { echo "slurm_up: $*"; }
fail() { echo "slurm_up: $*" >&2; exit 1; }

is_up() {  # the controller answers, and the node takes work
    command -v scontrol sinfo >/dev/null || return 1
    timeout 5 scontrol ping 2>/dev/null | grep -q 'is UP' || return 1
    timeout 5 sinfo -h -N -o %T 2>/dev/null | grep -Eqx 'idle|mixed|allocated|completing'
}

patiently() {  # SECONDS COMMAND...: until COMMAND succeeds
    local left=$(($1 * 5)); shift
    until "$@" >/dev/null 2>&1; do
        ((left-- > 0)) || return 1
        sleep 0.2
    done
}

lives() {  # NAME: the daemon of that name that this script started is alive
    local pid; pid=$(cat "$PIDS/$1.pid" 2>/dev/null) && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$1" ]
}

install_packages() {
    local missing=() pair plugin
    for pair in slurmctld=slurmctld slurmd=slurmd sbatch=slurm-client munged=munge; do
        command -v "${pair%=*}" >/dev/null || missing+=("${pair#*=}")
    done
    plugin=$(find /usr/lib -path '*/pmix2/lib/libpmix.so.2' -print -quit)
    [ -n "$plugin" ] || missing+=(libpmix2)
    if ((${#missing[@]})); then
        command -v apt-get >/dev/null || fail "needs ${missing[*]}, and there is no apt-get to install them with"
        tell "installing ${missing[*]}"
        export DEBIAN_FRONTEND=noninteractive
        apt-get update -qq
        apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null || fail "can't install ${missing[*]}"
        plugin=$(find /usr/lib -path '*/pmix2/lib/libpmix.so.2' -print -quit)
    fi
    # Slurm opens libpmix.so by that bare name; linked under a running slurmd it would wedge the node.
    [ -e "${plugin%.2}" ] || ln -s libpmix.so.2 "${plugin%.2}"
}

start_munge() {
    install -d -o munge -g munge -m 0700 /etc/munge /var/lib/munge /var/log/munge
    install -d -o munge -g munge -m 0755 /run/munge
    [ -s /etc/munge/munge.key ] || (umask 077 && dd if=/dev/urandom of=/etc/munge/munge.key bs=1024 count=1 status=none)
    chown munge: /etc/munge/munge.key
    chmod 0400 /etc/munge/munge.key
    if ! munge -n </dev/null 2>/dev/null | unmunge >/dev/null 2>&1; then
        setpriv --reuid=munge --regid=munge --init-groups munged --force 2>/dev/null || fail 'munged does not start'
        patiently 10 sh -c 'munge -n </dev/null | unmunge' || fail 'munged does not answer'
        cp /run/munge/munged.pid "$PIDS/munged.pid"
    fi
}

write_configuration() {
    if [ -e "$CONF" ] && ! grep -qF "$OURS" "$CONF"; then
        fail "$CONF is not this script's, and is left alone; move it away to have a test Slurm here"
    fi
    local memory; memory=$(awk '/^MemTotal/ { print int($2 * 0.9 / 1024) }' /proc/meminfo)
    cat >"$CONF" <<END
$OURS
ClusterName=fedbench
SlurmctldHost=$NODE(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job waits until its old credential has run out: 2 minutes unless said.
AuthInfo=cred_expire=5
SlurmctldPidFile=$PIDS/slurmctld.pid
SlurmdPidFile=$PIDS/slurmd.pid
StateSaveLocation=$LIB/controller
SlurmdSpoolDir=$LIB/node
SlurmctldLogFile=$LOGS/slurmctld.log
SlurmdLogFile=$LOGS/slurmd.log
# Without cgroups and systemd: a job's processes are found by their parents.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
MpiDefault=$MPI
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0,batch_sched_delay=0
# The node has the CPUs that are written here, whatever the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
MinJobAge=300
JobRequeue=1
# Numbers never come back after a clean start: MPICH names shared memory by job and step, and what a killed rank left
# behind under the same name breaks a later job.
FirstJobId=$(($(date +%s) % 60000000 + 1))
NodeName=$NODE NodeAddr=127.0.0.1 CPUs=$CPUS RealMemory=$memory State=UNKNOWN
PartitionName=main Nodes=$NODE Default=YES MaxTime=INFINITE State=UP
END
}

start_daemons() {
    lives slurmctld || slurmctld -c
    patiently 20 sh -c 'scontrol ping | grep -q "is UP"' || fail "slurmctld does not answer, see $LOGS/slurmctld.log"
    lives slurmd || slurmd -c || fail "slurmd does not start, see $LOGS/slurmd.log"
    patiently 10 is_up || scontrol update nodename="$NODE" state=resume || true
    patiently 10 is_up || fail "the node takes no work: $(sinfo -h -N -o '%T %E'), see $LOGS/slurmd.log"
    [ "$(timeout 30 srun --mpi=none echo ran)" = ran ] || fail 'a first job did not run'
}

if [ "${1:-}" = --check ]; then
    if is_up; then tell up; exit 0; else tell 'not up'; exit 3; fi
fi
if is_up; then tell 'up already'; exit 0; fi
[ "$(id -u)" = 0 ] || fail 'root is needed to install and start Slurm; run it as root, or bring a Slurm of your own up'
install_packages
mkdir -p "$PIDS" "$LIB/controller" "$LIB/node" "$LOGS" "${CONF%/*}"
write_configuration
start_munge
start_daemons
tell "up after $SECONDS s: node $NODE with $CPUS CPUs, srun --mpi=pmix and --mpi=pmi2, logs in $LOGS"
