-- What is true of the whole cluster: its id, and the key with which its parts know each other.
CREATE TABLE cluster (
    name        TEXT    PRIMARY KEY,
    value       TEXT    NOT NULL
);

INSERT INTO cluster (name, value) VALUES
    ('id', replace(gen_random_uuid()::text, '-', '')),
    ('replica_key', replace(gen_random_uuid()::text || gen_random_uuid()::text, '-', ''));
