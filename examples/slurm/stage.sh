#!/bin/bash
# Starts a stage on every node of a SLURM job: stage.sh ACCELERATE_CONFIG -m fusion_trainer train config.yaml
# Without SLURM, NODES, RANK and HEAD say how many machines there are, which this is, and where the first one is.
set -euo pipefail
config=$1
shift
if [ -n "${SLURM_JOB_NODELIST:-}" ] && [ -z "${RANK:-}" ]; then
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    HEAD=${hosts%%$'\n'*}
    export HEAD NODES=$SLURM_NNODES
    export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # since 22.05 srun does not take the job's own
    exec srun --ntasks-per-node=1 bash -c 'RANK=$SLURM_NODEID exec "$0" "$@"' "$0" "$config" "$@"
fi
processes=$(python -c "import sys, yaml; print(yaml.safe_load(open(sys.argv[1]))['num_processes'])" "$config")
exec accelerate launch --config_file "$config" --num_machines "${NODES:-1}" --machine_rank "${RANK:-0}" \
    --num_processes "$processes" --main_process_ip "${HEAD:-127.0.0.1}" --main_process_port "${PORT:-29500}" "$@"
