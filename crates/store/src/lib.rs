//! Named immutable objects: RAM, local directory, S3.
