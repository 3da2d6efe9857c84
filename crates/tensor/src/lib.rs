//! Buffers and ops, forward and backward, on CPUs.
