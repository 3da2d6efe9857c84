//! State of the cluster and its reconciler: models, jobs, keys, leases.
