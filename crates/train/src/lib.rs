//! The training loop: schedule, optimizer, checkpoints, exact resume.
