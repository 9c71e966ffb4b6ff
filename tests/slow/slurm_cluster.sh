#!/bin/bash
# A Slurm cluster on this machine, for tests: every "node" is a slurmd of its own, with 8 GPUs that are empty files.
#
#     tests/slow/slurm_cluster.sh up DIR NODES      then: export SLURM_CONF=DIR/slurm.conf
#     tests/slow/slurm_cluster.sh down DIR
#
# Everything it writes is in DIR. Exit code 3: something is not installed, the message says what.
set -euo pipefail

die() {
    echo "slurm_cluster.sh: $*" >&2
    exit 1
}

daemons=(munged:munge slurmctld:slurmctld slurmd:slurmd sbatch:slurm-client)

up() {
    local nodes=$1 missing=() pair port host
    for pair in "${daemons[@]}"; do
        command -v "${pair%:*}" >/dev/null || missing+=("${pair#*:}")
    done
    if ((${#missing[@]})); then
        echo "slurm_cluster.sh: not installed; on Debian: apt-get install ${missing[*]}" >&2
        exit 3
    fi
    [[ ! -e $SLURM_CONF ]] || die "$dir has been used: take a new folder"

    port=$(free_ports "$((nodes + 1))")
    host=$(hostname -s)
    mkdir -p "$dir"/state
    (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
    touch "$dir"/gpu{0..7} # Slurm wants to see device files, but does not open them
    echo "Name=gpu File=$dir/gpu[0-7]" >"$dir/gres.conf"
    cat >"$SLURM_CONF" <<END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$port
SlurmUser=$(id -un)
SlurmdUser=$(id -un)
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmdSpoolDir=$dir/spool-%n
SlurmctldPidFile=$dir/slurmctld.pid
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdLogFile=$dir/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
ReturnToService=2
SlurmdTimeout=60
KillWait=30
GresTypes=gpu
NodeName=n[1-$nodes] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((port + 1))-$((port + nodes))] CPUs=16 Gres=gpu:8
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
END
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" 2>>"$dir/munged.log"
    slurmctld -c
    for ((n = 1; n <= nodes; n++)); do
        mkdir -p "$dir/spool-n$n"
        CLUSTER_NODE=n$n slurmd -N "n$n" # by it tests find what a node runs
    done
    for ((n = 0; n < 150; n++)); do
        [[ $(sinfo -h -t idle -o %D 2>/dev/null) == "$nodes" ]] && return
        sleep 0.2
    done
    sinfo --long >&2 || true
    die "the nodes are not up after 30 s; logs are in $dir"
}

# The first of COUNT ports that nobody listens on.
free_ports() {
    local first n
    for _ in {1..50}; do
        first=$((20000 + RANDOM % 10000))
        for ((n = first; n < first + $1; n++)); do
            (: <"/dev/tcp/127.0.0.1/$n") 2>/dev/null && continue 2
        done
        echo "$first" && return
    done
    die "no free ports"
}

# End jobs, then the daemons, by the process ids they wrote down, and wait until they are gone.
down() {
    local file pids=()
    [[ -e $SLURM_CONF ]] || die "no cluster in $dir"
    timeout 5 scancel --user="$(id -un)" 2>/dev/null || true
    for ((n = 0; n < 50; n++)); do
        [[ $(timeout 5 squeue -h 2>/dev/null) ]] || break
        sleep 0.2
    done
    for file in "$dir"/slurmd-*.pid "$dir"/slurmctld.pid "$dir"/munged.pid; do
        [[ -f $file ]] && pids+=("$(<"$file")")
    done
    ((${#pids[@]})) || return 0
    kill "${pids[@]}" 2>/dev/null || true
    for ((n = 0; n < 100; n++)); do
        kill -0 "${pids[@]}" 2>/dev/null || return 0 # fails once all are gone
        sleep 0.1
    done
    die "still alive: ${pids[*]}"
}

[[ $# -ge 2 ]] || die "usage: slurm_cluster.sh up DIR NODES | down DIR"
dir=$(realpath -m "$2")
export SLURM_CONF=$dir/slurm.conf
case $1 in
up) up "${3:-2}" ;;
down) down ;;
*) die "up or down?" ;;
esac
