-- The machines that run jobs.
CREATE TABLE nodes (
    name        TEXT    PRIMARY KEY,
    -- open, cordoned (starts nothing new) or draining (stops what it runs, too).
    mode        TEXT    NOT NULL,
    cores       BIGINT NOT NULL,
    memory_bytes BIGINT NOT NULL,
    seen_ms     BIGINT NOT NULL
);
