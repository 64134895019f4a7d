"""What the experiments share: runs and their records, sweeps on Optuna, statistics over seeds, figures."""
