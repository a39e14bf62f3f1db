//! Plain products by cuBLASLt, where its library is installed: the third door to foreign code.
//!
//! The library is loaded when the first product asks for it, and looked for by its usual names; without it every product goes to the
//! kernels of this crate, which is said in no error. For a form of product the library's first choice of an algorithm is taken once
//! and kept, with a workspace of its own that never changes, so a form always has the same bits on one machine.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DriverError};

use super::launch;
use crate::gpu::{PlainForm, PlainProduct};

use super::driver::Memory;

/// What NVIDIA advises for Hopper; older devices need 4 MiB.
const WORKSPACE_BYTES: usize = 32 << 20;

/// The library, opened for one device.
pub(super) struct Library {
    handle: Handle,
    workspace: CudaSlice<u8>,
    /// By form; `None` for one that the library cannot do.
    plans: Mutex<HashMap<PlainForm, Option<Arc<Plan>>>>,
}

struct Handle(sys::cublasLtHandle_t);

// SAFETY: cuBLASLt's handle holds nothing that belongs to a thread, and its functions may be called from several at once
// ("cublasLt is thread-safe", cuBLAS documentation, section on cuBLASLt's use).
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: the handle was made by `create_handle` and is destroyed once.
        let _ = unsafe { result::destroy_handle(self.0) };
    }
}

/// A product's description and the algorithm chosen for it.
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    /// Of the right factor, the left one and the result, as column-major matrices.
    layouts: Vec<sys::cublasLtMatrixLayout_t>,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

// SAFETY: descriptions and layouts are plain values behind pointers, which nobody changes after they were made.
unsafe impl Send for Plan {}
// SAFETY: as above.
unsafe impl Sync for Plan {}

impl Drop for Plan {
    fn drop(&mut self) {
        for layout in self.layouts.drain(..) {
            // SAFETY: it was made by `create_matrix_layout` and is destroyed once.
            let _ = unsafe { result::destroy_matrix_layout(layout) };
        }
        // SAFETY: it was made by `create_matmul_desc` and is destroyed once.
        let _ = unsafe { result::destroy_matmul_desc(self.description) };
    }
}

/// Why the library was not opened.
pub(super) enum Unusable {
    Missing,
    Refused(CublasError),
    NoWorkspace(DriverError),
}

impl std::fmt::Display for Unusable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing => f.write_str("it is not installed"),
            Self::Refused(error) => write!(f, "it does not start: {error}"),
            Self::NoWorkspace(error) => write!(f, "there is no memory for it: {error}"),
        }
    }
}

impl Library {
    pub(super) fn open(stream: &Arc<CudaStream>) -> Result<Self, Unusable> {
        // SAFETY: loads and closes the library under the names that cudarc will use; its initialisers ask nothing of the process.
        if !unsafe { sys::is_culib_present() } {
            return Err(Unusable::Missing);
        }
        Ok(Self {
            handle: Handle(result::create_handle().map_err(Unusable::Refused)?),
            workspace: launch::allocate(stream, WORKSPACE_BYTES).map_err(Unusable::NoWorkspace)?,
            plans: Mutex::new(HashMap::new()),
        })
    }

    /// Queues a product; `false` for a form that the library cannot do. The caller has compared the operands' sizes with the form.
    pub(super) fn product(&self, stream: &CudaStream, product: &PlainProduct<'_, Memory>) -> Result<bool, CublasError> {
        let Some(plan) = self.plan(product.form) else {
            return Ok(false);
        };
        let address = |span: crate::gpu::Span<'_, Memory>| span.memory.address(stream) + span.first as u64;
        let (alpha, beta) = (1.0f32, if product.accumulate { 1.0f32 } else { 0.0 });
        let [right, left, out] = [product.right, product.left, product.out].map(|span| address(span) as *mut c_void);
        let [of_right, of_left, of_out] = plan.layouts[..] else {
            return Ok(false);
        };
        // SAFETY: handle, description, layouts and workspace live in `self` and `plan`. The operands have the bytes their layouts
        // span, which the caller compared, and outlive the work as those of launches do. The library reads the two factors
        // before it returns, since their mode is that of the host.
        unsafe {
            result::matmul(
                self.handle.0,
                plan.description,
                (&raw const alpha).cast(),
                (&raw const beta).cast(),
                right,
                of_right,
                left,
                of_left,
                out,
                of_out,
                out,
                of_out,
                &raw const plan.algorithm,
                self.workspace.device_ptr(stream).0 as *mut c_void,
                WORKSPACE_BYTES,
                stream.cu_stream().cast(),
            )
        }?;
        Ok(true)
    }

    fn plan(&self, form: PlainForm) -> Option<Arc<Plan>> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = plans.entry(form);
        plan.or_insert_with(|| Plan::new(&self.handle, form).ok().map(Arc::new))
            .clone()
    }
}

impl Plan {
    /// The library's matrices are column-major, ours row-major, so it is told of the transposed product: `outᵀ = op(right) · leftᵀ`,
    /// where `rightᵀ` is how it sees our right factor.
    fn new(handle: &Handle, form: PlainForm) -> Result<Self, CublasError> {
        let half = sys::cudaDataType::CUDA_R_16BF;
        let [rows, columns, depth] = [form.rows, form.columns, form.depth].map(|extent| extent as u64);
        let description = result::create_matmul_desc(
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cudaDataType::CUDA_R_32F,
        )?;
        let mut plan = Self {
            description,
            layouts: Vec::new(),
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        let transposed = i32::from(form.reads_rows);
        // SAFETY: the description was made above; the attribute is an i32.
        unsafe {
            result::set_matmul_desc_attribute(
                plan.description,
                sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
                (&raw const transposed).cast(),
                size_of::<i32>(),
            )
        }?;
        let right = if form.reads_rows {
            (depth, columns)
        } else {
            (columns, depth)
        };
        for (height, width) in [right, (depth, rows), (columns, rows)] {
            plan.layouts
                .push(result::create_matrix_layout(half, height, width, height as i64)?);
        }
        plan.algorithm = plan.chosen(handle)?;
        Ok(plan)
    }

    fn chosen(&self, handle: &Handle) -> Result<sys::cublasLtMatmulAlgo_t, CublasError> {
        let [right, left, out] = self.layouts[..] else {
            return Err(CublasError(sys::cublasStatus_t::CUBLAS_STATUS_INVALID_VALUE));
        };
        let preference = result::create_matmul_pref()?;
        let bytes = WORKSPACE_BYTES;
        // SAFETY: the preference was made above; the attribute is a size. Description and layouts live in `self`, the handle in
        // the library.
        let found = unsafe {
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const bytes).cast(),
                size_of::<usize>(),
            )
            .and_then(|()| {
                result::get_matmul_algo_heuristic(handle.0, self.description, right, left, out, out, preference)
            })
        };
        // SAFETY: the preference was made above and is destroyed once.
        unsafe { result::destroy_matmul_pref(preference) }?;
        Ok(found?.algo)
    }
}
