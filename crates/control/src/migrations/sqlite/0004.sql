-- The machines that run jobs.
CREATE TABLE nodes (
    name        TEXT    PRIMARY KEY,
    -- open, cordoned (starts nothing new) or draining (stops what it runs, too).
    mode        TEXT    NOT NULL,
    cores       INTEGER NOT NULL,
    memory_bytes INTEGER NOT NULL,
    seen_ms     INTEGER NOT NULL
) STRICT;
