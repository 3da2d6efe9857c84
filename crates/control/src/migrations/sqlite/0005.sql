-- Models on their way from training to being live.
CREATE TABLE promotions (
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    model       TEXT    NOT NULL,
    -- What was declared, as JSON.
    pipeline    TEXT    NOT NULL,
    -- The version that is to be live; known once the row is there.
    candidate   TEXT    NOT NULL,
    stage       TEXT    NOT NULL,
    cancelled   INTEGER NOT NULL DEFAULT 0,
    -- The job of this stage.
    job         INTEGER,
    -- What was measured, and what happened, as JSON.
    scores      TEXT    NOT NULL DEFAULT '{}',
    history     TEXT    NOT NULL DEFAULT '[]',
    created_ms  INTEGER NOT NULL,
    changed_ms  INTEGER NOT NULL
) STRICT;

CREATE INDEX promotions_stage ON promotions (stage);
