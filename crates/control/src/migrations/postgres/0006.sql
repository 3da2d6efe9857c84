-- What machines have, more of it; what they measured last, as JSON; and which machine it is that uses the name.
ALTER TABLE nodes ADD COLUMN accelerators BIGINT NOT NULL DEFAULT 0;
ALTER TABLE nodes ADD COLUMN disk_bytes BIGINT NOT NULL DEFAULT 0;
ALTER TABLE nodes ADD COLUMN jobs_max BIGINT NOT NULL DEFAULT 4;
ALTER TABLE nodes ADD COLUMN machine TEXT NOT NULL DEFAULT '';
ALTER TABLE nodes ADD COLUMN load TEXT;

-- Since when a job waits, and on which nodes it runs with how many ranks (JSON).
ALTER TABLE jobs ADD COLUMN waiting_ms BIGINT;
ALTER TABLE jobs ADD COLUMN placed TEXT;

-- What each replica of a model needs: the needs of its job, as JSON.
ALTER TABLE deployments ADD COLUMN needs TEXT;

-- What a key may do: 'use' is asking models, 'member' also seeing and stopping jobs, 'admin' everything. Keys of before
-- could see everything; the console's is the machine's own.
ALTER TABLE keys ADD COLUMN role TEXT NOT NULL DEFAULT 'member';
UPDATE keys SET role = 'admin' WHERE name = 'console';

-- What the jobs of a project may use at once; without a number, as much as there is.
CREATE TABLE projects (
    name        TEXT    PRIMARY KEY,
    cores_max   BIGINT,
    memory_bytes_max BIGINT,
    accelerators_max BIGINT,
    jobs_max    BIGINT
);
