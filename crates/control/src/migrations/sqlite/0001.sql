-- Times are milliseconds since the Unix epoch. Lists and variants are JSON in TEXT, so that PostgreSQL can hold the same.

CREATE TABLE keys (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    name        TEXT    NOT NULL,
    -- SHA-256 of the key; the key itself is never stored.
    hash        BLOB    NOT NULL UNIQUE CHECK (length(hash) = 32),
    created_ms  INTEGER NOT NULL,
    revoked_ms  INTEGER
) STRICT;

CREATE TABLE models (
    name        TEXT    PRIMARY KEY,
    kind        TEXT    NOT NULL,
    -- A bundle's prefix in the store, or a path.
    source      TEXT    NOT NULL,
    created_ms  INTEGER NOT NULL
) STRICT;

CREATE TABLE leases (
    name        TEXT    PRIMARY KEY,
    holder      TEXT    NOT NULL,
    -- The fencing token: grows by one with every acquisition and never falls.
    token       INTEGER NOT NULL,
    expires_ms  INTEGER NOT NULL
) STRICT;

CREATE TABLE jobs (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    name        TEXT    NOT NULL,
    spec        TEXT    NOT NULL,
    desired     TEXT    NOT NULL,
    state       TEXT    NOT NULL,
    n_starts    INTEGER NOT NULL DEFAULT 0,
    n_failures  INTEGER NOT NULL DEFAULT 0,
    n_short     INTEGER NOT NULL DEFAULT 0,
    process     TEXT,
    ending      TEXT,
    message     TEXT,
    log_path    TEXT,
    created_ms  INTEGER NOT NULL,
    started_ms  INTEGER,
    finished_ms INTEGER,
    retry_ms    INTEGER,
    stop_ms     INTEGER,
    -- A job has a process exactly while it runs.
    CHECK ((state = 'running') = (process IS NOT NULL))
) STRICT;

-- A name belongs to at most one job that is not over.
CREATE UNIQUE INDEX jobs_name_unfinished ON jobs (name) WHERE state IN ('pending', 'running', 'interrupted');

CREATE INDEX jobs_state ON jobs (state);
