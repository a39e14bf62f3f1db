//! NVRTC, the CUDA compiler that is a library: bound here by hand and opened by path.
//!
//! Unlike cudarc's binding it can be any version (12 and 13 have the same functions), lie in any folder, and its absence is a
//! value instead of a panic.
//!
//! What holds throughout: the functions have the types that NVRTC's documentation gives them; the library is never closed; and
//! a program's handle lives in one [`Program`], which destroys it.

#![allow(unsafe_code)]

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::ptr;

use libloading::os::unix::{Library, RTLD_NOW, Symbol};

use super::Target;
use crate::error::{Error, Result};

/// The environment variable that names NVRTC's library or the folder it is in.
pub const VARIABLE: &str = "BRIGHTRUN_NVRTC";

/// Beside the binary, where an image may put it.
const BESIDE: &str = "nvrtc";
/// Where NVIDIA's packages for Linux put it.
const USUAL: &str = "/usr/local/cuda/lib64";
/// What the system's loader may find.
const NAMES: [&str; 3] = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"];

type Handle = *mut c_void;
type Status = c_int;
const SUCCESS: Status = 0;

/// An open NVRTC.
pub struct Nvrtc {
    version: (u32, u32),
    place: String,
    create: unsafe extern "C" fn(
        *mut Handle,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(Handle, c_int, *const *const c_char) -> Status,
    destroy: unsafe extern "C" fn(*mut Handle) -> Status,
    log_size: unsafe extern "C" fn(Handle, *mut usize) -> Status,
    log: unsafe extern "C" fn(Handle, *mut c_char) -> Status,
    cubin_size: unsafe extern "C" fn(Handle, *mut usize) -> Status,
    cubin: unsafe extern "C" fn(Handle, *mut c_char) -> Status,
    target_count: unsafe extern "C" fn(*mut c_int) -> Status,
    targets: unsafe extern "C" fn(*mut c_int) -> Status,
    error_text: unsafe extern "C" fn(Status) -> *const c_char,
}

/// A text that is compiled: its name in messages, itself, and what it may include.
pub(super) struct Text<'a> {
    pub(super) name: &'a str,
    pub(super) text: &'a str,
    /// By the names they are included by.
    pub(super) headers: &'a [(&'a str, &'a str)],
}

impl Nvrtc {
    /// The NVRTC of this machine: what [`VARIABLE`] names, or that beside the binary, or the system's.
    ///
    /// # Errors
    /// [`Error::Unsupported`], with every place that was looked at; also when the named one cannot be opened.
    pub fn find() -> Result<Self> {
        if let Some(named) = std::env::var_os(VARIABLE).filter(|value| !value.is_empty()) {
            return Self::open(Path::new(&named));
        }
        let beside = std::env::current_exe()
            .ok()
            .and_then(|binary| Some(binary.parent()?.join(BESIDE)));
        let folders = beside.into_iter().chain([PathBuf::from(USUAL)]);
        let mut tried: Vec<String> = Vec::new();
        for place in folders.filter(|folder| folder.is_dir()).chain(NAMES.map(PathBuf::from)) {
            match Self::open(&place) {
                Ok(found) => return Ok(found),
                Err(Error::Unsupported { reason, .. }) => tried.push(reason),
                Err(error) => tried.push(error.to_string()),
            }
        }
        Err(absent(format!(
            "no NVRTC was found ({VARIABLE} may name it): {}",
            tried.join("; ")
        )))
    }

    /// The NVRTC at a path: its library, a folder that has it, or one whose `lib` has it.
    ///
    /// # Errors
    /// [`Error::Unsupported`].
    pub fn open(path: &Path) -> Result<Self> {
        let folder = [path.join("lib"), path.to_owned()]
            .into_iter()
            .find(|folder| !libraries(folder, "libnvrtc.so").is_empty());
        let library = match &folder {
            Some(folder) => {
                // NVRTC opens its second half by name, which the loader finds only if it is, and stays, open.
                for builtins in libraries(folder, "libnvrtc-builtins.so") {
                    load(&builtins).map(std::mem::forget)?;
                }
                libraries(folder, "libnvrtc.so").pop()
            }
            None => None,
        };
        let path = library.unwrap_or_else(|| path.to_owned());
        let handle = load(&path)?;
        let mut opened = Self {
            version: (0, 0),
            place: path.display().to_string(),
            create: symbol(&handle, "nvrtcCreateProgram")?,
            compile: symbol(&handle, "nvrtcCompileProgram")?,
            destroy: symbol(&handle, "nvrtcDestroyProgram")?,
            log_size: symbol(&handle, "nvrtcGetProgramLogSize")?,
            log: symbol(&handle, "nvrtcGetProgramLog")?,
            cubin_size: symbol(&handle, "nvrtcGetCUBINSize")?,
            cubin: symbol(&handle, "nvrtcGetCUBIN")?,
            target_count: symbol(&handle, "nvrtcGetNumSupportedArchs")?,
            targets: symbol(&handle, "nvrtcGetSupportedArchs")?,
            error_text: symbol(&handle, "nvrtcGetErrorString")?,
        };
        let version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> Status = symbol(&handle, "nvrtcVersion")?;
        std::mem::forget(handle); // its functions are called as long as the process lives
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both pointers are to locals.
        let status = unsafe { version(&raw mut major, &raw mut minor) };
        opened.check(status, "asking for its version")?;
        opened.version = (major.unsigned_abs(), minor.unsigned_abs());
        Ok(opened)
    }

    /// Its CUDA version: (major, minor).
    pub fn version(&self) -> (u32, u32) {
        self.version
    }

    /// Where it was found.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Every target it knows that the kernels are written for.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub fn targets(&self) -> Result<Vec<Target>> {
        let mut count = 0;
        // SAFETY: the pointer is to a local.
        self.check(unsafe { (self.target_count)(&raw mut count) }, "counting targets")?;
        let mut numbers: Vec<c_int> = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: the array has as many elements as NVRTC just said it writes.
        self.check(unsafe { (self.targets)(numbers.as_mut_ptr()) }, "listing targets")?;
        let numbers: Vec<u32> = numbers.into_iter().map(c_int::unsigned_abs).collect();
        Ok(Target::of_compiler(&numbers))
    }

    /// Compiles to machine code.
    ///
    /// # Errors
    /// [`Error::Device`], with the compiler's log.
    pub(super) fn compile(&self, text: &Text<'_>, options: &[String]) -> Result<Vec<u8>> {
        let program = Program::new(self, text)?;
        let options = strings(options.iter().map(String::as_str))?;
        let pointers = pointers(&options);
        let count = length(&pointers)?;
        // SAFETY: the program is live; the array has `count` terminated strings, which outlive the call.
        let status = unsafe { (self.compile)(program.handle, count, pointers.as_ptr()) };
        if status != SUCCESS {
            let log = program.text(self.log_size, self.log).unwrap_or_default();
            let log = String::from_utf8_lossy(&log);
            return Err(failed(format!(
                "compiling {} with {} by NVRTC {}.{}: {}\n{}",
                text.name,
                options
                    .iter()
                    .map(|option| option.to_string_lossy())
                    .collect::<Vec<_>>()
                    .join(" "),
                self.version.0,
                self.version.1,
                self.words(status),
                log.trim_end_matches('\0').trim_end()
            )));
        }
        program.text(self.cubin_size, self.cubin)
    }

    fn words(&self, status: Status) -> String {
        // SAFETY: NVRTC answers any number with a static terminated string.
        let text = unsafe { (self.error_text)(status) };
        if text.is_null() {
            return format!("error {status}");
        }
        // SAFETY: checked for null; static and terminated as above.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }

    fn check(&self, status: Status, what: &str) -> Result<()> {
        if status == SUCCESS {
            return Ok(());
        }
        Err(failed(format!("NVRTC, {what}: {}", self.words(status))))
    }
}

/// A program of NVRTC's, destroyed when dropped.
struct Program<'a> {
    nvrtc: &'a Nvrtc,
    handle: Handle,
}

impl<'a> Program<'a> {
    fn new(nvrtc: &'a Nvrtc, text: &Text<'_>) -> Result<Self> {
        let main = strings([text.text, text.name])?;
        let [source, name] = [0, 1].map(|index| main.get(index).map_or(ptr::null(), |text: &CString| text.as_ptr()));
        let names = strings(text.headers.iter().map(|(name, _)| *name))?;
        let texts = strings(text.headers.iter().map(|(_, text)| *text))?;
        let (names, texts) = (pointers(&names), pointers(&texts));
        let count = length(&names)?;
        let mut handle = ptr::null_mut();
        // SAFETY: NVRTC copies the texts. All are terminated and outlive the call, and both arrays have `count` elements.
        let status = unsafe { (nvrtc.create)(&raw mut handle, source, name, count, texts.as_ptr(), names.as_ptr()) };
        nvrtc.check(status, "taking in a source")?;
        Ok(Self { nvrtc, handle })
    }

    /// Bytes that one function sizes and another writes.
    fn text(
        &self,
        size: unsafe extern "C" fn(Handle, *mut usize) -> Status,
        write: unsafe extern "C" fn(Handle, *mut c_char) -> Status,
    ) -> Result<Vec<u8>> {
        let mut bytes = 0;
        // SAFETY: the program is live, the pointer is to a local.
        let status = unsafe { size(self.handle, &raw mut bytes) };
        self.nvrtc.check(status, "sizing its output")?;
        let mut text = vec![0u8; bytes];
        // SAFETY: the program is live, and NVRTC writes as many bytes as it just said.
        let status = unsafe { write(self.handle, text.as_mut_ptr().cast()) };
        self.nvrtc.check(status, "writing its output")?;
        Ok(text)
    }
}

impl Drop for Program<'_> {
    fn drop(&mut self) {
        // SAFETY: the handle came from `create` and is destroyed once.
        unsafe { (self.nvrtc.destroy)(&raw mut self.handle) };
    }
}

/// Files in a folder whose names begin so, by name: a newer version's last.
fn libraries(folder: &Path, begin: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let named = entries.filter(|entry| entry.file_name().to_string_lossy().starts_with(begin));
    let mut paths: Vec<PathBuf> = named.map(|entry| entry.path()).collect();
    paths.sort();
    paths
}

fn load(path: &Path) -> Result<Library> {
    // SAFETY: the path was named by the user, lies beside the binary or is the system's own NVRTC; its initialisers ask
    // nothing of this process.
    unsafe { Library::open(Some(path), RTLD_NOW) }.map_err(|error| absent(format!("{}: {error}", path.display())))
}

fn symbol<T: Copy>(handle: &Library, name: &str) -> Result<T> {
    // SAFETY: the caller names `T` as the type that NVRTC's documentation gives this function.
    let symbol: Symbol<T> = unsafe { handle.get(name.as_bytes()) }.map_err(|error| absent(error.to_string()))?;
    Ok(*symbol)
}

fn strings<'a>(texts: impl IntoIterator<Item = &'a str>) -> Result<Vec<CString>> {
    let strings = texts
        .into_iter()
        .map(|text| CString::new(text).map_err(|error| failed(error.to_string())));
    strings.collect()
}

fn pointers(strings: &[CString]) -> Vec<*const c_char> {
    strings.iter().map(|string| string.as_ptr()).collect()
}

fn length(pointers: &[*const c_char]) -> Result<c_int> {
    c_int::try_from(pointers.len()).map_err(|error| failed(error.to_string()))
}

fn absent(reason: String) -> Error {
    Error::Unsupported {
        op: "compiling kernels",
        backend: "cuda",
        reason,
    }
}

fn failed(message: String) -> Error {
    Error::Device { op: "cuda", message }
}
