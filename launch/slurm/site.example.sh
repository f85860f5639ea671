# Copy to launch/slurm/site.sh: what this cluster needs before Python starts. Every rank sources it, on every node.

# module load cuda/12.8
# export NCCL_SOCKET_IFNAME=ib0 HF_HOME=/scratch/$USER/huggingface

# The command that runs Python; .venv/bin/python of the repository if not set.
# PYTHON=(/shared/venvs/neuroada/bin/python)
# PYTHON=(apptainer exec --nv /shared/images/neuroada.sif python)
