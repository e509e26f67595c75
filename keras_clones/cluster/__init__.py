"""Processes of a cluster: which there are, how they meet, serve and start.

In: `TF_CONFIG`, the variables of a Slurm step, addresses.
Out: TensorFlow connected to the devices of all processes. It knows no models.
"""
