-- Models that replicas serve: what is wanted.
CREATE TABLE deployments (
    model       TEXT    PRIMARY KEY,
    -- Replicas wanted now, within the bounds that scaling keeps to.
    n_replicas  INTEGER NOT NULL,
    n_min       INTEGER NOT NULL,
    n_max       INTEGER NOT NULL,
    -- The source that is live, and the one on trial with its share of the requests.
    live        TEXT    NOT NULL,
    canary      TEXT,
    canary_percent INTEGER NOT NULL DEFAULT 0,
    -- More of the command line of `loquat serve`, a JSON list.
    args        TEXT    NOT NULL,
    -- The last decision, in words.
    message     TEXT,
    created_ms  INTEGER NOT NULL,
    changed_ms  INTEGER NOT NULL,
    CHECK (n_min >= 0 AND n_min <= n_max)
) STRICT;

-- Who serves them, and where.
CREATE TABLE replicas (
    -- The job of that name runs it; an engine of somebody else's has no job.
    name        TEXT    PRIMARY KEY,
    model       TEXT    NOT NULL,
    version     TEXT    NOT NULL,
    url         TEXT    NOT NULL,
    -- 1: a job of ours. 0: an engine elsewhere, with the key it wants, if any.
    own         INTEGER NOT NULL,
    key         TEXT,
    draining    INTEGER NOT NULL DEFAULT 0,
    seen_ms     INTEGER NOT NULL
) STRICT;

CREATE INDEX replicas_model ON replicas (model);
