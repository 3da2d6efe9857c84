//! Finding the library, and the names in it.
//!
//! Handles are Open MPI's: addresses of objects in the library, the same from 4.0 to 5.0 (its `libmpi.so.40`).
//! MPICH and its kin have other handles under the same names; they are told apart by what they lack, and refused.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

/// A handle of Open MPI: the address of an object that the library owns.
pub(crate) type Handle = *mut c_void;

/// Why MPI cannot be used, or what it said.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no MPI library can be loaded; tried {}", tried.join("; "))]
    NoLibrary { tried: Vec<String> },
    #[error("{library} has no {name}: it is not Open MPI 4 or 5, the only one that is known here")]
    NotOpenMpi { library: String, name: &'static str },
    #[error("{function}: {text}")]
    Mpi { function: &'static str, text: String },
    /// Of a library that survives it: ranks are dead, or others say that some are.
    #[error("{function}: {text}")]
    Lost { function: &'static str, text: String },
}

type InitThread = unsafe extern "C" fn(*mut c_int, *mut *mut *mut c_char, c_int, *mut c_int) -> c_int;
type NoArguments = unsafe extern "C" fn() -> c_int;
type OfComm = unsafe extern "C" fn(Handle, *mut c_int) -> c_int;
type SetHandler = unsafe extern "C" fn(Handle, Handle) -> c_int;
type Send = unsafe extern "C" fn(*const c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle) -> c_int;
type Receive = unsafe extern "C" fn(*mut c_void, c_int, Handle, c_int, c_int, Handle, *mut Handle) -> c_int;
type TestRequest = unsafe extern "C" fn(*mut Handle, *mut c_int, *mut Status) -> c_int;
type GetCount = unsafe extern "C" fn(*const Status, Handle, *mut c_int) -> c_int;
type AllReduce = unsafe extern "C" fn(*const c_void, *mut c_void, c_int, Handle, Handle, Handle) -> c_int;
type Text = unsafe extern "C" fn(*mut c_char, *mut c_int) -> c_int;
type ErrorText = unsafe extern "C" fn(c_int, *mut c_char, *mut c_int) -> c_int;
type ErrorClass = unsafe extern "C" fn(c_int, *mut c_int) -> c_int;
type GetAttribute = unsafe extern "C" fn(Handle, c_int, *mut *mut c_int, *mut c_int) -> c_int;
type OnComm = unsafe extern "C" fn(Handle) -> c_int;
type Shrink = unsafe extern "C" fn(Handle, *mut Handle) -> c_int;
type Agree = unsafe extern "C" fn(Handle, *mut c_int, *mut Handle) -> c_int;

/// Open MPI 5: the attribute that says whether ranks may outlive others, and the classes of errors that tell of lost ones
/// (`MPI_ERR_PROC_FAILED`, `…_PENDING`, `MPI_ERR_REVOKED`).
pub(crate) const ATTRIBUTE_FT: c_int = 12;
const LOST: std::ops::RangeInclusive<c_int> = 75..=77;

/// Open MPI's `MPI_Status`: five fields, 24 bytes on 64 bits; the rest is room.
#[repr(C, align(8))]
pub(crate) struct Status([u8; 64]);

impl Status {
    pub(crate) fn new() -> Status {
        Status([0; 64])
    }
}

/// What is used of the library. It stays loaded until the process ends.
pub(crate) struct Library {
    pub(crate) path: String,
    pub(crate) init_thread: InitThread,
    pub(crate) finalize: NoArguments,
    pub(crate) comm_rank: OfComm,
    pub(crate) comm_size: OfComm,
    pub(crate) comm_set_errhandler: SetHandler,
    pub(crate) isend: Send,
    pub(crate) irecv: Receive,
    pub(crate) test: TestRequest,
    pub(crate) get_count: GetCount,
    pub(crate) all_reduce: AllReduce,
    pub(crate) library_version: Text,
    error_string: ErrorText,
    error_class: ErrorClass,
    pub(crate) get_attribute: GetAttribute,
    pub(crate) survival: Option<Survival>,
    pub(crate) world: Handle,
    pub(crate) byte: Handle,
    pub(crate) float: Handle,
    pub(crate) sum: Handle,
    pub(crate) errors_return: Handle,
}

/// User-level failure mitigation (ULFM): what those do that are left.
pub(crate) struct Survival {
    pub(crate) revoke: OnComm,
    pub(crate) shrink: Shrink,
    pub(crate) agree: Agree,
}

/// Longer than `MPI_MAX_LIBRARY_VERSION_STRING` and `MPI_MAX_ERROR_STRING`.
const TEXT_MAX: usize = 8192;

impl Library {
    /// The first of these files that can be loaded; a bare name is searched for as the system does.
    pub(crate) fn open(candidates: &[PathBuf]) -> Result<Library, Error> {
        let mut tried = Vec::new();
        for path in candidates {
            match load(path) {
                Ok(library) => return Library::of(library, path),
                Err(why) => tried.push(why),
            }
        }
        Err(Error::NoLibrary { tried })
    }

    fn of(library: *mut c_void, path: &Path) -> Result<Library, Error> {
        let path = path.display().to_string();
        let find = |name: &'static CStr| -> Result<*mut c_void, Error> {
            // SAFETY: `library` is what dlopen gave, never closed; the name ends in zero.
            let symbol = unsafe { libc::dlsym(library, name.as_ptr()) };
            let name = name.to_str().unwrap_or_default();
            if symbol.is_null() { Err(Error::NotOpenMpi { library: path.clone(), name }) } else { Ok(symbol) }
        };
        macro_rules! function {
            // SAFETY: the MPI standard gives the function of this name this signature, in C's calling convention.
            ($name:literal as $kind:ty) => {
                unsafe { std::mem::transmute::<*mut c_void, $kind>(find($name)?) }
            };
        }
        let can_survive = find(c"MPIX_Comm_shrink").is_ok();
        let survival = || -> Result<Survival, Error> {
            Ok(Survival {
                revoke: function!(c"MPIX_Comm_revoke" as OnComm),
                shrink: function!(c"MPIX_Comm_shrink" as Shrink),
                agree: function!(c"MPIX_Comm_iagree" as Agree),
            })
        };
        Ok(Library {
            survival: if can_survive { Some(survival()?) } else { None },
            world: find(c"ompi_mpi_comm_world")?,
            byte: find(c"ompi_mpi_byte")?,
            float: find(c"ompi_mpi_float")?,
            sum: find(c"ompi_mpi_op_sum")?,
            errors_return: find(c"ompi_mpi_errors_return")?,
            init_thread: function!(c"MPI_Init_thread" as InitThread),
            finalize: function!(c"MPI_Finalize" as NoArguments),
            comm_rank: function!(c"MPI_Comm_rank" as OfComm),
            comm_size: function!(c"MPI_Comm_size" as OfComm),
            comm_set_errhandler: function!(c"MPI_Comm_set_errhandler" as SetHandler),
            isend: function!(c"MPI_Isend" as Send),
            irecv: function!(c"MPI_Irecv" as Receive),
            test: function!(c"MPI_Test" as TestRequest),
            get_count: function!(c"MPI_Get_count" as GetCount),
            all_reduce: function!(c"MPI_Allreduce" as AllReduce),
            library_version: function!(c"MPI_Get_library_version" as Text),
            error_string: function!(c"MPI_Error_string" as ErrorText),
            error_class: function!(c"MPI_Error_class" as ErrorClass),
            get_attribute: function!(c"MPI_Comm_get_attr" as GetAttribute),
            path: path.clone(),
        })
    }

    /// Turns what a function returned into a result.
    pub(crate) fn check(&self, function: &'static str, code: c_int) -> Result<(), Error> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: as `text` asks for.
        let text = unsafe { text(|buffer, len| (self.error_string)(code, buffer, len)) };
        let mut class = code;
        // SAFETY: it writes one int.
        unsafe { (self.error_class)(code, &mut class) };
        let is_lost = self.survival.is_some() && LOST.contains(&class);
        Err(if is_lost { Error::Lost { function, text } } else { Error::Mpi { function, text } })
    }
}

/// A text that a function of MPI writes.
///
/// SAFETY: `write` must write at most [`TEXT_MAX`] bytes to its first argument and their number to its second.
pub(crate) unsafe fn text(write: impl FnOnce(*mut c_char, *mut c_int) -> c_int) -> String {
    let mut buffer = vec![0u8; TEXT_MAX];
    let mut len = 0;
    write(buffer.as_mut_ptr().cast(), &mut len);
    buffer.truncate((len.max(0) as usize).min(TEXT_MAX));
    String::from_utf8_lossy(&buffer).trim_end_matches('\0').to_owned()
}

/// Loads with global names, which Open MPI's own plug-ins look for.
fn load(path: &Path) -> Result<*mut c_void, String> {
    let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(|e| e.to_string())?;
    // SAFETY: the name ends in zero. Loading runs the library's initializers: it is the MPI that the user chose.
    let library = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !library.is_null() {
        return Ok(library);
    }
    // SAFETY: dlerror gives null or a text that lives until the next call of dl* in this thread.
    let why = unsafe {
        let text = libc::dlerror();
        if text.is_null() { None } else { Some(CStr::from_ptr(text).to_string_lossy().into_owned()) }
    };
    Err(why.unwrap_or_else(|| path.display().to_string()))
}
