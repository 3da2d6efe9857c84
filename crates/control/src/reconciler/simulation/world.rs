//! The simulated world: processes, time, and the launcher that reaches them.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use super::{Tally, take_turn};
use crate::database::Control;
use crate::error::{Error, Result};
use crate::job::{Ending, Job, JobId};
use crate::launcher::{Launcher, Observed, Prepared, StopHow};
use crate::leases::LeaseInfo;
use crate::nodes::NodeSpec;
use crate::process::ProcessRef;
use crate::reconcile::EXIT_INTERRUPTED;
use crate::reconciler::{Worker, lease_name};
use crate::testing::Random;

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Life {
    /// Prepared; ends by itself when this incarnation of a controller dies.
    Gated,
    Running {
        asked_to_stop: bool,
        ignores_requests: bool,
    },
    Ended(Ending),
}

pub(super) struct Instance {
    pub(super) job: JobId,
    pub(super) process: ProcessRef,
    /// The incarnation that started it; only it can tell how it ended.
    pub(super) parent: u64,
    pub(super) life: Life,
}

#[derive(Clone)]
pub(super) enum Message {
    Release(ProcessRef),
    Stop(ProcessRef, StopHow),
}

pub(super) struct World {
    pub(super) random: Random,
    pub(super) now: Arc<AtomicI64>,
    pub(super) control: Control,
    pub(super) chaos: bool,
    pub(super) next_ticks: u64,
    pub(super) next_incarnation: u64,
    pub(super) boot: u64,
    pub(super) node: Option<NodeSpec>,
    /// What reached processes, to reach them again.
    pub(super) sent: Vec<Message>,
    pub(super) instances: Vec<Instance>,
    /// What a job still has to do; survives its processes, as a checkpoint does.
    pub(super) work_left: BTreeMap<JobId, u64>,
    /// Attempts that really failed, counted by the world and not by the controllers.
    pub(super) n_failures: BTreeMap<JobId, u32>,
    pub(super) tally: Tally,
}

pub(super) type SharedWorld = Arc<Mutex<World>>;
pub(super) type SharedWorkers = Arc<Mutex<[Option<Worker>; 2]>>;

/// Unwinds out of a controller's turn, as kill −9 would end it.
pub(super) struct Crash;

pub(super) struct SimulatedLauncher {
    pub(super) world: SharedWorld,
    pub(super) workers: SharedWorkers,
    pub(super) who: usize,
    pub(super) incarnation: u64,
}

pub(super) fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl SimulatedLauncher {
    /// Every boundary between a write and an effect: nothing happens, the controller dies, or it sleeps while the other
    /// one goes on.
    fn boundary(&self) {
        let fate = {
            let mut world = lock(&self.world);
            if !world.chaos {
                return;
            }
            let fate = world.random.below(100);
            if fate < 2 {
                world.tally.crashes += 1;
            } else if fate < 10 {
                world.tally.nested += 1;
                let pause = world.random.below(20_000) as i64;
                world.now.fetch_add(pause, Ordering::SeqCst);
            }
            fate
        };
        if fate < 2 {
            resume_unwind(Box::new(Crash));
        } else if fate < 10 {
            take_turn(&self.world, &self.workers, 1 - self.who);
        }
    }
}

impl SimulatedLauncher {
    fn holder(&self) -> Option<LeaseInfo> {
        let world = lock(&self.world);
        let name = lease_name(world.node.as_ref().map(|node| node.name.as_str()));
        world.control.lease_holder(&name).unwrap()
    }

    /// Called where a write under the lease has just been committed: nobody else may hold it.
    fn assert_holder(&self) {
        let found = self.holder();
        let holder = found.map_or(self.incarnation.to_string(), |lease| lease.holder);
        assert_eq!(holder, self.incarnation.to_string(), "a controller acted under another one's lease");
    }
}

impl Launcher for SimulatedLauncher {
    fn prepare(&mut self, job: &Job) -> Result<Prepared> {
        self.boundary();
        let process = {
            let mut world = lock(&self.world);
            if world.chaos && world.random.percent(3) {
                *world.n_failures.entry(job.id).or_default() += 1;
                return Err(Error::StartProcess {
                    program: "simulated".into(),
                    source: std::io::ErrorKind::OutOfMemory.into(),
                });
            }
            world.add_instance(job.id, self.incarnation)
        };
        self.boundary();
        let log_path = None;
        Ok(Prepared { process, log_path })
    }

    fn release(&mut self, process: &ProcessRef) -> Result<()> {
        self.assert_holder();
        self.boundary();
        let lease = self.holder();
        let late = lease.is_none_or(|lease| lease.holder != self.incarnation.to_string());
        lock(&self.world).tally.late += usize::from(late);
        lock(&self.world).send(Message::Release(process.clone()));
        self.boundary();
        Ok(())
    }

    fn abandon(&mut self, process: &ProcessRef) -> Result<()> {
        self.boundary();
        let mut world = lock(&self.world);
        let instance = world.instance(process);
        assert!(!matches!(instance.life, Life::Running { .. }), "an abandoned process must not have run");
        instance.life = Life::Ended(Ending::Signaled(9));
        Ok(())
    }

    fn poll(&mut self, job: &Job) -> Result<Observed> {
        self.boundary();
        let mut world = lock(&self.world);
        let process = job.process.as_ref().expect("a job that runs");
        let instance = world.instance(process);
        let own = instance.parent == self.incarnation;
        let observed = match instance.life {
            Life::Ended(ending) if own => Observed::Ended(ending),
            Life::Ended(_) => Observed::Ended(Ending::Lost),
            _ => Observed::Running,
        };
        world.tally.adopted += usize::from(!own && observed == Observed::Running);
        Ok(observed)
    }

    fn stop(&mut self, process: &ProcessRef, how: StopHow) -> Result<()> {
        self.assert_holder();
        self.boundary();
        lock(&self.world).send(Message::Stop(process.clone(), how));
        self.boundary();
        Ok(())
    }

    fn forget(&mut self, _: &ProcessRef) {
        self.assert_holder();
        self.boundary();
    }

    fn tick(&mut self) {
        self.boundary();
    }
}

impl World {
    fn instance(&mut self, process: &ProcessRef) -> &mut Instance {
        self.instances
            .iter_mut()
            .find(|instance| instance.process == *process)
            .expect("only processes that were started are named")
    }

    fn add_instance(&mut self, job: JobId, parent: u64) -> ProcessRef {
        // A handful of pids, so that they come around again and again.
        let taken = |pid: u32, all: &[Instance]| {
            all.iter().any(|i| i.process.pid == pid && !matches!(i.life, Life::Ended(_)))
        };
        let pid = (100..).find(|pid| !taken(*pid, &self.instances)).unwrap_or(100);
        self.next_ticks += 1;
        let process = ProcessRef {
            pid,
            start_ticks: self.next_ticks,
            boot_id: self.boot.to_string(),
            mark: self.next_ticks.to_string(),
            node: self.node.as_ref().map(|node| node.name.clone()).unwrap_or_default(),
        };
        self.instances.push(Instance { job, process: process.clone(), parent, life: Life::Gated });
        process
    }

    /// Delivers a message, now and then twice.
    fn send(&mut self, message: Message) {
        let n_times = if self.random.percent(20) { 2 } else { 1 };
        for _ in 0..n_times {
            self.deliver(message.clone());
        }
        self.sent.push(message);
    }

    /// Delivers again what was sent at any time before.
    pub(super) fn replay(&mut self) {
        if self.sent.is_empty() {
            return;
        }
        let at = self.random.below(self.sent.len() as u64) as usize;
        self.deliver(self.sent[at].clone());
        self.tally.replayed += 1;
    }

    fn deliver(&mut self, message: Message) {
        match message {
            Message::Release(process) => self.release(&process),
            Message::Stop(process, how) => self.stop(&process, how),
        }
    }

    /// The cores of what runs on the node.
    fn check_room(&self) {
        let Some(node) = &self.node else { return };
        let running = self.instances.iter().filter(|i| matches!(i.life, Life::Running { .. }));
        let cores: u32 = running
            .map(|instance| self.control.get_job(instance.job).unwrap().map_or(0, |job| job.spec.needs.cores))
            .sum();
        assert!(cores <= node.cores, "{cores} cores are used of {}", node.cores);
    }

    fn release(&mut self, process: &ProcessRef) {
        let ignores_requests = self.random.percent(20);
        let instance = self.instance(process);
        if instance.life != Life::Gated {
            return;
        }
        instance.life = Life::Running { asked_to_stop: false, ignores_requests };
        let job = instance.job;
        let n_running =
            self.instances.iter().filter(|i| i.job == job && matches!(i.life, Life::Running { .. })).count();
        assert_eq!(n_running, 1, "{job} runs {n_running} times at once");
        let recorded = self.control.get_job(job).unwrap().unwrap();
        assert_eq!(
            recorded.process.as_ref(),
            Some(process),
            "{job} runs in a process that the database does not know"
        );
        self.check_room();
    }

    fn stop(&mut self, process: &ProcessRef, how: StopHow) {
        let job = self.instance(process).job;
        let recorded = self.control.get_job(job).unwrap().unwrap();
        if recorded.process.as_ref() == Some(process) {
            assert!(recorded.stop_sent_at.is_some(), "{job} is stopped without a record of it");
            let is_wanted = recorded.desired == crate::job::Desired::Running;
            self.tally.moved += usize::from(is_wanted && how == StopHow::Ask);
        }
        let instance = self.instance(process);
        instance.life = match (instance.life, how) {
            (Life::Ended(ending), _) => Life::Ended(ending),
            (Life::Gated, StopHow::Ask) => Life::Ended(Ending::Signaled(15)),
            (_, StopHow::Kill) => Life::Ended(Ending::Signaled(9)),
            (Life::Running { ignores_requests, .. }, StopHow::Ask) => {
                Life::Running { asked_to_stop: true, ignores_requests }
            }
        };
    }

    /// Time passes: processes work, end well or badly, and obey requests to stop.
    pub(super) fn advance(&mut self) {
        let ms = 500 + self.random.below(if self.chaos { 4_000 } else { 12_000 });
        self.now.fetch_add(ms as i64, Ordering::SeqCst);
        for at in 0..self.instances.len() {
            let Life::Running { asked_to_stop, ignores_requests } = self.instances[at].life else {
                continue;
            };
            let job = self.instances[at].job;
            let left = self.work_left.entry(job).or_default();
            *left = left.saturating_sub(ms);
            let ending = if asked_to_stop && !ignores_requests {
                Ending::Exited(EXIT_INTERRUPTED)
            } else if *left == 0 {
                Ending::Exited(0)
            } else if self.chaos && self.random.percent(5) {
                let all = [Ending::Signaled(9), Ending::Exited(1), Ending::Exited(EXIT_INTERRUPTED)];
                all[self.random.below(3) as usize]
            } else {
                continue;
            };
            if !matches!(ending, Ending::Exited(0 | EXIT_INTERRUPTED)) {
                *self.n_failures.entry(job).or_default() += 1;
            }
            self.instances[at].life = Life::Ended(ending);
        }
    }

    /// A controller is gone: what it had prepared ends by itself, what it had started goes on.
    pub(super) fn bury(&mut self, incarnation: u64) {
        for instance in &mut self.instances {
            if instance.parent == incarnation && instance.life == Life::Gated {
                instance.life = Life::Ended(Ending::Exited(1));
            }
        }
    }
}
