-- Models that replicas serve: what is wanted.
CREATE TABLE deployments (
    model       TEXT    PRIMARY KEY,
    -- Replicas wanted now, within the bounds that scaling keeps to.
    n_replicas  BIGINT NOT NULL,
    n_min       BIGINT NOT NULL,
    n_max       BIGINT NOT NULL,
    -- The source that is live, and the one on trial with its share of the requests.
    live        TEXT    NOT NULL,
    canary      TEXT,
    canary_percent BIGINT NOT NULL DEFAULT 0,
    -- More of the command line of `loquat serve`, a JSON list.
    args        TEXT    NOT NULL,
    -- The last decision, in words.
    message     TEXT,
    created_ms  BIGINT NOT NULL,
    changed_ms  BIGINT NOT NULL,
    CHECK (n_min >= 0 AND n_min <= n_max)
);

-- Who serves them, and where.
CREATE TABLE replicas (
    -- The job of that name runs it; an engine of somebody else's has no job.
    name        TEXT    PRIMARY KEY,
    model       TEXT    NOT NULL,
    version     TEXT    NOT NULL,
    url         TEXT    NOT NULL,
    -- 1: a job of ours. 0: an engine elsewhere, with the key it wants, if any.
    own         BIGINT NOT NULL,
    key         TEXT,
    draining    BIGINT NOT NULL DEFAULT 0,
    seen_ms     BIGINT NOT NULL
);

CREATE INDEX replicas_model ON replicas (model);
