//! [`World`]: all ranks that were started together, or those that are left of them, and messages between them.

use std::ffi::c_int;
use std::ops::Range;
use std::path::PathBuf;
use std::ptr;
use std::rc::Rc;
use std::sync::Arc;

use crate::library::{ATTRIBUTE_FT, Error, Handle, Library, Status, Survival, text};

/// `MPI_THREAD_FUNNELED`: only the thread that began calls MPI.
const THREAD_FUNNELED: c_int = 1;

/// MPI as one rank sees it. It stays in the thread that began it, as MPI wants it.
pub struct World {
    library: Rc<Library>,
    /// The communicator.
    comm: Handle,
    rank: usize,
    n_ranks: usize,
}

/// A message on its way. One that is dropped before it is done leaves its memory to MPI for ever: it may still be written.
pub struct Request {
    library: Rc<Library>,
    handle: Handle,
    buffer: Option<Buffer>,
}

/// Keeps what is sent from changing, and what is received from being read.
enum Buffer {
    Sent(Arc<[f32]>),
    SentBytes(Box<[u8]>),
    Received(Box<[f32]>),
    ReceivedBytes(Box<[u8]>),
    /// What this rank says, and then what all say together.
    Agreed(Box<c_int>),
}

/// What became of a message.
pub enum Test {
    Pending,
    Sent,
    Received(Box<[f32]>),
    ReceivedBytes(Box<[u8]>),
    /// Whether all that are left said yes.
    Agreed(bool),
}

impl World {
    /// Loads the first of the candidates that is there, and joins the ranks that were started with this process; alone
    /// where it was started by hand. Once a process.
    pub fn join(candidates: &[PathBuf]) -> Result<World, Error> {
        let library = Library::open(candidates)?;
        let mut provided = 0;
        // SAFETY: null arguments are allowed since MPI 2; the last points to an int.
        let code = unsafe {
            (library.init_thread)(ptr::null_mut(), ptr::null_mut(), THREAD_FUNNELED, &mut provided)
        };
        library.check("MPI_Init_thread", code)?;
        let comm = library.world;
        World::of(Rc::new(library), comm)
    }

    fn of(library: Rc<Library>, comm: Handle) -> Result<World, Error> {
        // SAFETY: handles of the library itself.
        let code = unsafe { (library.comm_set_errhandler)(comm, library.errors_return) };
        library.check("MPI_Comm_set_errhandler", code)?;
        let (mut rank, mut n_ranks) = (0, 0);
        // SAFETY: each writes one int.
        library.check("MPI_Comm_rank", unsafe { (library.comm_rank)(comm, &mut rank) })?;
        // SAFETY: as above.
        library.check("MPI_Comm_size", unsafe { (library.comm_size)(comm, &mut n_ranks) })?;
        Ok(World { library, comm, rank: rank as usize, n_ranks: n_ranks as usize })
    }

    /// Whether those that are left can go on when ranks die: the library has what that takes, and the launcher, which would
    /// else end all of them, was told so (`mpirun --with-ft ulfm`).
    pub fn can_survive(&self) -> Result<bool, Error> {
        Ok(self.survival()?.is_some())
    }

    fn survival(&self) -> Result<Option<&Survival>, Error> {
        let Some(survival) = &self.library.survival else { return Ok(None) };
        let (mut value, mut is_there): (*mut c_int, c_int) = (ptr::null_mut(), 0);
        // SAFETY: an attribute of this kind is given as the address of an int that the library owns.
        let code = unsafe {
            (self.library.get_attribute)(self.library.world, ATTRIBUTE_FT, &mut value, &mut is_there)
        };
        self.library.check("MPI_Comm_get_attr", code)?;
        // SAFETY: as above, where it is there.
        let is_on = is_there != 0 && !value.is_null() && unsafe { *value } != 0;
        Ok(Some(survival).filter(|_| is_on))
    }

    /// Ends what the others wait for in this world: they learn that ranks were lost.
    pub fn revoke(&self) -> Result<(), Error> {
        let Some(survival) = self.survival()? else { return Err(self.cannot("MPIX_Comm_revoke")) };
        // SAFETY: the communicator is valid.
        self.library.check("MPIX_Comm_revoke", unsafe { (survival.revoke)(self.comm) })
    }

    /// Says yes or no; once all that are left have, all know whether all said yes, the same on each.
    pub fn agree(&self, own: bool) -> Result<Request, Error> {
        let Some(survival) = self.survival()? else { return Err(self.cannot("MPIX_Comm_iagree")) };
        let mut flag = Box::new(c_int::from(own));
        let mut handle = ptr::null_mut();
        // SAFETY: the request owns the int at this address, on the heap, and leaks it where it is never done.
        let code = unsafe { (survival.agree)(self.comm, &mut *flag, &mut handle) };
        self.library.check("MPIX_Comm_iagree", code)?;
        Ok(Request { library: self.library.clone(), handle, buffer: Some(Buffer::Agreed(flag)) })
    }

    /// The world of those that are left. Waits until all of them have come here.
    pub fn shrink(&mut self) -> Result<(), Error> {
        let Some(survival) = self.survival()? else { return Err(self.cannot("MPIX_Comm_shrink")) };
        let mut left = ptr::null_mut();
        // SAFETY: the communicator is valid; the other argument is room for a handle.
        self.library.check("MPIX_Comm_shrink", unsafe { (survival.shrink)(self.comm, &mut left) })?;
        // The old one, of which messages may still be under way, stays: a few hundred bytes for each time.
        *self = World::of(self.library.clone(), left)?;
        Ok(())
    }

    fn cannot(&self, function: &'static str) -> Error {
        Error::Mpi { function, text: "the ranks were not started so that some may be lost".to_owned() }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn n_ranks(&self) -> usize {
        self.n_ranks
    }

    /// The library's file and what it says of itself.
    pub fn library(&self) -> String {
        // SAFETY: it writes less than `TEXT_MAX` bytes and their number.
        let version = unsafe { text(|buffer, len| (self.library.library_version)(buffer, len)) };
        let first = version.split([',', '\n']).next().unwrap_or_default();
        format!("{} ({first})", self.library.path)
    }

    /// Sends a part of `values`, whose memory is held until it is done.
    pub fn send(
        &self,
        to: usize,
        tag: u16,
        (values, part): (Arc<[f32]>, Range<usize>),
    ) -> Result<Request, Error> {
        let slice = &values[part];
        let (at, n_bytes) = (slice.as_ptr().cast(), size_of_val(slice));
        self.start_send(to, tag, (at, n_bytes), Buffer::Sent(values))
    }

    pub fn send_bytes(&self, to: usize, tag: u16, bytes: &[u8]) -> Result<Request, Error> {
        let bytes: Box<[u8]> = bytes.into();
        let (at, n_bytes) = (bytes.as_ptr(), bytes.len());
        self.start_send(to, tag, (at, n_bytes), Buffer::SentBytes(bytes))
    }

    fn start_send(
        &self,
        to: usize,
        tag: u16,
        (at, n_bytes): (*const u8, usize),
        buffer: Buffer,
    ) -> Result<Request, Error> {
        let mut handle = ptr::null_mut();
        let library = &self.library;
        let count = count(n_bytes);
        // SAFETY: `buffer` owns the bytes at `at` and lives, unmoved on the heap and unwritten, as long as the request.
        let code = unsafe {
            (library.isend)(at.cast(), count, library.byte, to as c_int, tag.into(), self.comm, &mut handle)
        };
        library.check("MPI_Isend", code)?;
        Ok(Request { library: library.clone(), handle, buffer: Some(buffer) })
    }

    /// Receives exactly as many values as `into` holds.
    pub fn receive(&self, from: usize, tag: u16, mut into: Box<[f32]>) -> Result<Request, Error> {
        let (at, n_bytes) = (into.as_mut_ptr().cast(), size_of_val(&into[..]));
        self.start_receive(from, tag, (at, n_bytes), Buffer::Received(into))
    }

    /// Receives exactly `n` bytes.
    pub fn receive_bytes(&self, from: usize, tag: u16, n: usize) -> Result<Request, Error> {
        let mut into = vec![0u8; n].into_boxed_slice();
        let at = into.as_mut_ptr();
        self.start_receive(from, tag, (at, n), Buffer::ReceivedBytes(into))
    }

    fn start_receive(
        &self,
        from: usize,
        tag: u16,
        (at, n_bytes): (*mut u8, usize),
        buffer: Buffer,
    ) -> Result<Request, Error> {
        let mut handle = ptr::null_mut();
        let library = &self.library;
        let count = count(n_bytes);
        // SAFETY: `buffer` owns the bytes at `at`, on the heap; nobody reads them until the request is done, and they are
        // leaked if it never is.
        let code = unsafe {
            (library.irecv)(at.cast(), count, library.byte, from as c_int, tag.into(), self.comm, &mut handle)
        };
        library.check("MPI_Irecv", code)?;
        Ok(Request { library: library.clone(), handle, buffer: Some(buffer) })
    }

    /// The library's own sum over ranks, in an order of its own: what ours is measured against.
    pub fn all_reduce_of_the_library(&self, values: &[f32]) -> Result<Vec<f32>, Error> {
        let mut sums = vec![0.0f32; values.len()];
        let library = &self.library;
        let (from, to) = (values.as_ptr().cast(), sums.as_mut_ptr().cast());
        let n = count(values.len());
        // SAFETY: both hold `n` floats and do not overlap; the call is over when it returns.
        let code = unsafe { (library.all_reduce)(from, to, n, library.float, library.sum, self.comm) };
        library.check("MPI_Allreduce", code)?;
        Ok(sums)
    }

    /// Leaves the others in order; waits for them to do the same.
    pub fn leave(self) -> Result<(), Error> {
        // SAFETY: the value is consumed: nothing of MPI is called after this.
        self.library.check("MPI_Finalize", unsafe { (self.library.finalize)() })
    }
}

fn count(n: usize) -> c_int {
    c_int::try_from(n).unwrap_or_else(|_| panic!("{n} in one message: cut it into parts"))
}

impl Request {
    /// Whether it is done; to be asked no more once it is.
    pub fn test(&mut self) -> Result<Test, Error> {
        let (mut done, mut status) = (0, Status::new());
        // SAFETY: the handle is this request's, not yet done; the others are an int and room for a status.
        let code = unsafe { (self.library.test)(&mut self.handle, &mut done, &mut status) };
        let tested = self.library.check("MPI_Test", code);
        if let Some(Buffer::Agreed(flag)) = self.buffer.take_if(|buffer| buffer.is_agreed() && done != 0) {
            // That some are dead is told beside it, and changes nothing of what the others have agreed on.
            return Ok(Test::Agreed(*flag != 0));
        }
        tested?;
        if done == 0 {
            return Ok(Test::Pending);
        }
        let mut n_bytes = 0;
        match self.buffer.take() {
            None | Some(Buffer::Sent(_) | Buffer::SentBytes(_) | Buffer::Agreed(_)) => Ok(Test::Sent),
            Some(received) => {
                // SAFETY: the status is the one that the receive has filled.
                let code = unsafe { (self.library.get_count)(&status, self.library.byte, &mut n_bytes) };
                self.library.check("MPI_Get_count", code)?;
                match received {
                    Buffer::Received(values) if size_of_val(&values[..]) == n_bytes as usize => {
                        Ok(Test::Received(values))
                    }
                    Buffer::ReceivedBytes(bytes) if bytes.len() == n_bytes as usize => {
                        Ok(Test::ReceivedBytes(bytes))
                    }
                    other => Err(Error::Mpi { function: "MPI_Get_count", text: other.short(n_bytes) }),
                }
            }
        }
    }
}

impl Buffer {
    fn is_agreed(&self) -> bool {
        matches!(self, Buffer::Agreed(_))
    }

    fn short(&self, n_bytes: c_int) -> String {
        let expected = match self {
            Buffer::Sent(values) => size_of_val(&values[..]),
            Buffer::Received(values) => size_of_val(&values[..]),
            Buffer::SentBytes(bytes) | Buffer::ReceivedBytes(bytes) => bytes.len(),
            Buffer::Agreed(_) => size_of::<c_int>(),
        };
        format!("a message of {n_bytes} bytes where {expected} were expected")
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        if let Some(buffer) = self.buffer.take() {
            // MPI may read or write it at any time from now on.
            std::mem::forget(buffer);
        }
    }
}
