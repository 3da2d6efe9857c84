-- What is true of the whole cluster: its id, and the key with which its parts know each other.
CREATE TABLE cluster (
    name        TEXT    PRIMARY KEY,
    value       TEXT    NOT NULL
) STRICT;

INSERT INTO cluster (name, value) VALUES
    ('id', lower(hex(randomblob(16)))),
    ('replica_key', lower(hex(randomblob(32))));
