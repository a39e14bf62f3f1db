//! Steps, their memory, and recordings, on the emulation.

#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::{Arc, Mutex};

use super::{Gpu, PlainForm, Runtime, SharedRows};
use crate::dtype::DType;
use crate::emu::Emulation;
use crate::error::{Error, Result};
use crate::ops::{
    AttentionForward, AttentionOps, Device, EmbeddingOps, GroupedLinearBackward, GroupedLinearForward,
    GroupedPairBackward, GroupedSwigluForward, LinearBackward, LinearForward, MatmulOps, MoeOps, Precision,
    QuantizeOps, Recorded, Recording, Routing, RowOrder, Write,
};
use crate::stack::WeightStack;
use crate::tensor::{Segments, Tensor};
use crate::testing::{Calls, Random, Watched};
use crate::weight::Weight;

pub(super) type Emulated = Gpu<Watched<Emulation>>;

/// `None`, told, where there is no compiler.
pub(super) fn device() -> Option<Emulated> {
    match Emulation::new(Some(2)) {
        Ok(emulation) => Some(Gpu::new(Watched::new(emulation)).unwrap()),
        Err(Error::Unsupported { reason, .. }) => {
            println!("emulated: absent (not tested): {reason}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn numbers(device: &Emulated, shape: [usize; 3], seed: u64) -> Tensor<Emulated> {
    let values = Random::new(seed).normal(shape.iter().product());
    let single = device.upload_f32(shape, &values).unwrap();
    let mut half = device.alloc(DType::BF16, shape).unwrap();
    device.copy(&single, &mut half).unwrap();
    half
}

/// Attention of some documents added to `sum`, through tensors that come and go.
fn attend(device: &Emulated, x: &Tensor<Emulated>, documents: &Segments, sum: &mut Tensor<Emulated>) -> Result<()> {
    use crate::ops::ActivationOps;
    let [tokens, heads] = [x.shape().extents()[0], x.shape().extents()[1]];
    let copied = {
        let mut copied = device.alloc(DType::BF16, x.shape())?;
        device.copy(x, &mut copied)?;
        copied
    };
    let mut out = device.alloc(DType::BF16, x.shape())?;
    let mut lse = device.alloc(DType::F32, [tokens, heads])?;
    device.attention_forward(AttentionForward {
        q: x,
        k: &copied,
        v: &copied,
        query_segments: documents,
        key_segments: documents,
        scale: 0.5,
        precision: Precision::Bf16,
        out: &mut out,
        lse: &mut lse,
    })?;
    device.add_assign(sum, &out)
}

const SHAPE: [usize; 3] = [70, 2, 16];

/// The work of one step on fresh tensors: what it leaves in `sum`.
fn eager(device: &Emulated, documents: &Segments, times: usize) -> Vec<u8> {
    let x = numbers(device, SHAPE, 1);
    let mut sum = device.zeros(DType::BF16, SHAPE).unwrap();
    for _ in 0..times {
        attend(device, &x, documents, &mut sum).unwrap();
    }
    device.read(&sum).unwrap()
}

fn recording(recorded: Recorded) -> Box<dyn Recording> {
    match recorded {
        Recorded::Yes(recording) => recording,
        Recorded::Not(reason) => panic!("{reason}"),
    }
}

#[test]
fn no_step_after_the_first_asks_for_memory() {
    let Some(device) = device() else { return };
    let x = numbers(&device, SHAPE, 1);
    let documents = Segments::from_lengths([40, 30]);
    let mut sum = device.zeros(DType::BF16, SHAPE).unwrap();
    let mut step = || device.step(|| attend(&device, &x, &documents, &mut sum)).unwrap();
    step();
    let first = device.runtime().calls();
    assert!(first.allocations > 0 && device.arena_bytes() > 0, "{first:?}");
    for _ in 0..3 {
        step();
        let Calls {
            allocations,
            writes,
            reads,
            ..
        } = device.runtime().calls();
        assert_eq!([allocations, writes, reads], [0; 3]);
    }
}

#[test]
fn a_larger_step_enlarges_the_arena_and_tensors_that_stay_keep_their_contents() {
    let Some(device) = device() else { return };
    let step = |bytes: usize| -> Result<Tensor<Emulated>> {
        device.step(|| {
            let kept = device.upload(DType::U8, [3], &[1, 2, 3])?;
            drop(device.zeros(DType::U8, [bytes])?);
            Ok(kept)
        })
    };
    let first = step(100).unwrap();
    assert_eq!(device.arena_bytes(), 0, "there is no plan while a tensor of it lives");
    drop(first);
    device.step(|| Ok::<_, Error>(())).unwrap();
    let small = device.arena_bytes();
    let kept = step(50).unwrap();
    drop(step(1000).unwrap());
    assert_eq!(device.read(&kept).unwrap(), [1, 2, 3]);
    assert_eq!(device.arena_bytes(), small);
    drop(kept);
    device.step(|| Ok::<_, Error>(())).unwrap();
    assert!(small > 0 && device.arena_bytes() >= 1000);
    let stats = device.memory();
    assert_eq!(stats.in_use_bytes, 0);
    assert!(stats.reserved_bytes >= device.arena_bytes());
}

#[test]
fn a_replay_does_for_other_documents_what_the_work_itself_does() {
    let Some(device) = device() else { return };
    let layouts = [[40, 30], [1, 69], [70, 0], [33, 37]].map(Segments::from_lengths);
    let x = numbers(&device, SHAPE, 1);
    let mut sum = device.zeros(DType::BF16, SHAPE).unwrap();
    device.step(|| attend(&device, &x, &layouts[0], &mut sum)).unwrap();
    let recorded = device.step(|| device.record(&layouts[1], || attend(&device, &x, &layouts[1], &mut sum)));
    let recording = recording(recorded.unwrap());
    let mut check = |documents: &Segments| {
        device.fill_zero(&mut sum).unwrap();
        device.runtime().calls();
        assert!(device.step(|| recording.replay(documents)).unwrap());
        let calls = device.runtime().calls();
        assert_eq!(
            [calls.allocations, calls.launches, calls.reads, calls.replays],
            [0, 0, 0, 1]
        );
        assert!(calls.writes <= 1, "only the tiles may be written: {calls:?}");
        assert_eq!(
            device.read(&sum).unwrap(),
            eager(&device, documents, 1),
            "{documents:?}"
        );
    };
    for documents in &layouts {
        check(documents);
    }
}

#[test]
fn recording_does_the_work_once() {
    let Some(device) = device() else { return };
    let documents = Segments::from_lengths([70]);
    let x = numbers(&device, SHAPE, 1);
    let mut sum = device.zeros(DType::BF16, SHAPE).unwrap();
    device.step(|| attend(&device, &x, &documents, &mut sum)).unwrap();
    let recorded = device.step(|| device.record(&documents, || attend(&device, &x, &documents, &mut sum)));
    assert!(matches!(recorded, Ok(Recorded::Yes(_))));
    assert_eq!(device.read(&sum).unwrap(), eager(&device, &documents, 2));
}

#[test]
fn what_cannot_be_repeated_is_named_and_done_all_the_same() {
    let Some(device) = device() else { return };
    let documents = Segments::from_lengths([70]);
    let x = numbers(&device, SHAPE, 1);
    let sum = Arc::new(Mutex::new(device.zeros(DType::BF16, SHAPE).unwrap()));
    let attend = || attend(&device, &x, &documents, &mut sum.lock().unwrap());
    device.step(attend).unwrap();
    let reads = || {
        attend()?;
        device.read(&sum.lock().unwrap()).map(|_| ())
    };
    let writes = || {
        attend()?;
        device.upload(DType::U8, [3], &[1, 2, 3]).map(|_| ())
    };
    let allocates = || {
        attend()?;
        device.alloc(DType::U8, [1 << 20]).map(|_| ())
    };
    let works: [(&dyn Fn() -> Result<()>, &str); 3] = [
        (
            &reads,
            "read: 4480 bytes are read by the host, which a recording cannot repeat (after add_assign)",
        ),
        (
            &writes,
            "write: 3 bytes are written from the host, which a recording cannot repeat (after add_assign)",
        ),
        (
            &allocates,
            "alloc: 1048576 bytes do not fit the step's memory, which a recording cannot repeat (after add_assign)",
        ),
    ];
    for (times, (work, expected)) in works.into_iter().enumerate() {
        match device.step(|| device.record(&documents, work)).unwrap() {
            Recorded::Not(reason) => assert_eq!(reason, expected),
            Recorded::Yes(_) => panic!("{expected}"),
        }
        assert_eq!(
            device.read(&sum.lock().unwrap()).unwrap(),
            eager(&device, &documents, times + 2)
        );
    }
}

#[test]
fn an_error_of_the_work_is_told_and_ends_the_recording() {
    let Some(device) = device() else { return };
    let documents = Segments::from_lengths([70]);
    let mut small = device.zeros(DType::F32, [1]).unwrap();
    device.step(|| device.zeros(DType::U8, [4]).map(|_| ())).unwrap();
    let other = device.zeros(DType::F32, [2]).unwrap();
    let failed = device.step(|| device.record(&documents, || device.copy(&other, &mut small)));
    assert!(matches!(failed, Err(Error::Shape { .. })));
    assert_eq!(device.read_f32(&small).unwrap(), [0.0], "nothing is captured any more");
}

#[test]
fn work_of_which_the_device_makes_no_graph_is_done_all_the_same() {
    let Some(device) = device() else { return };
    let documents = Segments::from_lengths([70]);
    let x = numbers(&device, SHAPE, 1);
    let mut sum = device.zeros(DType::BF16, SHAPE).unwrap();
    device.step(|| attend(&device, &x, &documents, &mut sum)).unwrap();
    let mut times = 0;
    let work = || {
        times += 1;
        attend(&device, &x, &documents, &mut sum)?;
        // Takes the capture away before it is asked for, the first time.
        match times {
            1 => device.runtime().end_capture().map(|_| ()),
            _ => Ok(()),
        }
    };
    match device.step(|| device.record(&documents, work)).unwrap() {
        Recorded::Not(reason) => assert!(reason.contains("a capture that never began"), "{reason}"),
        Recorded::Yes(_) => panic!("there was nothing to record"),
    }
    assert_eq!(device.read(&sum).unwrap(), eager(&device, &documents, 2));
}

#[test]
fn a_recording_ends_when_the_arena_moves_or_a_tensor_of_a_step_lives() {
    let Some(device) = device() else { return };
    let documents = Segments::from_lengths([70]);
    let x = numbers(&device, SHAPE, 1);
    let mut sum = device.zeros(DType::BF16, SHAPE).unwrap();
    device.step(|| attend(&device, &x, &documents, &mut sum)).unwrap();
    let recorded = device.step(|| device.record(&documents, || attend(&device, &x, &documents, &mut sum)));
    let recording = recording(recorded.unwrap());
    let alive = device.step(|| device.zeros(DType::U8, [1])).unwrap();
    assert!(!device.step(|| recording.replay(&documents)).unwrap());
    drop(alive);
    assert!(device.step(|| recording.replay(&documents)).unwrap());
    device.step(|| device.zeros(DType::U8, [1 << 20]).map(|_| ())).unwrap();
    assert!(!device.step(|| recording.replay(&documents)).unwrap());
}

#[test]
fn a_replay_reports_data_that_breaks_a_contract() {
    let Some(device) = device() else { return };
    let documents = Segments::from_lengths([2]);
    let table = Weight::Dense(numbers(&device, [4, 1, 8], 1).reshaped([4, 8]).unwrap());
    let mut ids = device.upload_i32([2], &[3, 0]).unwrap();
    let mut rows = device.alloc(DType::BF16, [2, 8]).unwrap();
    device.step(|| device.zeros(DType::U8, [4]).map(|_| ())).unwrap();
    let recorded = device.step(|| device.record(&documents, || device.gather_rows(&table, &ids, &mut rows)));
    let recording = recording(recorded.unwrap());
    device.read(&rows).unwrap();
    device.write(&mut ids, bytemuck::cast_slice(&[3, 4])).unwrap();
    assert!(device.step(|| recording.replay(&documents)).unwrap());
    let error = device.read(&rows).unwrap_err();
    assert!(
        matches!(
            error,
            Error::Value {
                op: "gather_rows",
                argument: "ids",
                ..
            }
        ),
        "{error}"
    );
}

/// Outputs and input gradients of a linear layer and of routed experts, both in NF4.
fn both_passes(device: &Emulated, layer: &Weight<Emulated>, stack: &WeightStack<Emulated>) -> [Vec<u8>; 4] {
    const TOKENS: usize = 40;
    let x = numbers(device, [1, TOKENS, 64], 5).reshaped([TOKENS, 64]).unwrap();
    let dy = numbers(device, [1, TOKENS, 96], 6).reshaped([TOKENS, 96]).unwrap();
    let room = |width: usize| device.alloc(DType::BF16, [TOKENS, width]).unwrap();
    let (mut y, mut dx, mut grouped_y, mut grouped_dx) = (room(96), room(64), room(96), room(64));
    let forward = LinearForward {
        x: &x,
        weight: layer,
        bias: None,
        lora: None,
        precision: Precision::Bf16,
        y: &mut y,
    };
    device.linear_forward(forward).unwrap();
    let backward = LinearBackward {
        dy: &dy,
        weight: layer,
        lora: None,
        precision: Precision::Bf16,
        dx: Some((&mut dx, Write::Overwrite)),
    };
    device.linear_backward(backward).unwrap();
    let mut routing = Routing::alloc(device, TOKENS, 3, 1).unwrap();
    let logits = device
        .upload_f32([TOKENS, 3], &Random::new(7).normal(TOKENS * 3))
        .unwrap();
    device.route(&logits, true, &mut routing).unwrap();
    let forward = GroupedLinearForward {
        x: &x,
        x_order: RowOrder::Token,
        routing: &routing,
        weight: stack,
        lora: None,
        precision: Precision::Bf16,
        y: &mut grouped_y,
    };
    device.grouped_linear_forward(forward).unwrap();
    let backward = GroupedLinearBackward {
        dy: &dy,
        dy_order: RowOrder::Grouped,
        routing: &routing,
        weight: stack,
        lora: None,
        precision: Precision::Bf16,
        dx: Some((&mut grouped_dx, Write::Overwrite)),
    };
    device.grouped_linear_backward(backward).unwrap();
    [y, dx, grouped_y, grouped_dx].map(|tensor| device.read(&tensor).unwrap())
}

#[test]
fn a_shared_weight_is_decoded_once_for_both_passes_and_changes_no_bit() {
    let Some(device) = device() else { return };
    let matrix = |seed: u64| {
        let values = Random::new(seed).normal(96 * 64);
        let source = device.upload_f32([96, 64], &values).unwrap();
        Weight::Nf4(device.quantize_nf4(&source, true).unwrap())
    };
    let layer = matrix(1);
    let mut stack = WeightStack::alloc_like(&device, 3, &layer).unwrap();
    for expert in 0..3 {
        device
            .stack_expert(&matrix(2 + expert as u64), expert, &mut stack)
            .unwrap();
    }
    let run = || both_passes(&device, &layer, &stack);
    let decodes = || {
        let launched = device.runtime().entries();
        ["dequantize_nested_bf16", "decode_stack"].map(|entry| launched.get(entry).copied().unwrap_or(0))
    };
    let fused = run();
    decodes();
    assert_eq!(device.sharing(|| Ok::<_, Error>(run())).unwrap(), fused);
    assert_eq!(decodes(), [0, 0], "too few rows by the roofline");
    device.share_from(SharedRows {
        linear: 40,
        experts: 13,
    });
    assert_eq!(run(), fused);
    assert_eq!(decodes(), [0, 0], "nothing is kept outside a scope");
    let live = device.memory().in_use_bytes;
    for _ in 0..2 {
        let shared = device.sharing(|| Ok::<_, Error>([run(), run()])).unwrap();
        assert_eq!(shared, [fused.clone(), fused.clone()]);
        assert_eq!(decodes(), [1, 1]);
        assert_eq!(device.memory().in_use_bytes, live, "the scope frees what it decoded");
    }
}

/// Both wide projections of routed experts with their activation, and the way back through them.
fn fused_passes(device: &Emulated, gate: &WeightStack<Emulated>, up: &WeightStack<Emulated>) -> [Vec<u8>; 2] {
    const TOKENS: usize = 40;
    let x = numbers(device, [1, TOKENS, 64], 5).reshaped([TOKENS, 64]).unwrap();
    let [dgate, dup] = [6, 7].map(|seed| numbers(device, [1, TOKENS, 96], seed).reshaped([TOKENS, 96]).unwrap());
    let mut y = device.alloc(DType::BF16, [TOKENS, 96]).unwrap();
    let mut dx = device.alloc(DType::BF16, [TOKENS, 64]).unwrap();
    let mut routing = Routing::alloc(device, TOKENS, 3, 1).unwrap();
    let logits = device
        .upload_f32([TOKENS, 3], &Random::new(8).normal(TOKENS * 3))
        .unwrap();
    device.route(&logits, true, &mut routing).unwrap();
    let forward = GroupedSwigluForward {
        x: &x,
        routing: &routing,
        gate,
        up,
        lora: None,
        precision: Precision::Bf16,
        wide: None,
        y: Some(&mut y),
    };
    device.grouped_swiglu_forward(forward).unwrap();
    let backward = GroupedPairBackward {
        dgate: &dgate,
        dup: &dup,
        routing: &routing,
        gate,
        up,
        lora: None,
        precision: Precision::Bf16,
        dx: Some(&mut dx),
    };
    device.grouped_pair_backward(backward).unwrap();
    [y, dx].map(|tensor| device.read(&tensor).unwrap())
}

#[test]
fn fused_experts_share_both_their_weights_and_change_no_bit() {
    let Some(device) = device() else { return };
    let stack = |first: u64| {
        let matrix = |seed: u64| {
            let source = device.upload_f32([96, 64], &Random::new(seed).normal(96 * 64)).unwrap();
            Weight::Nf4(device.quantize_nf4(&source, true).unwrap())
        };
        let mut stack = WeightStack::alloc_like(&device, 3, &matrix(first)).unwrap();
        for expert in 0..3 {
            device
                .stack_expert(&matrix(first + expert as u64), expert, &mut stack)
                .unwrap();
        }
        stack
    };
    let (gate, up) = (stack(1), stack(11));
    let fused = fused_passes(&device, &gate, &up);
    device.share_from(SharedRows {
        linear: 40,
        experts: 13,
    });
    device.runtime().entries();
    let shared = device
        .sharing(|| Ok::<_, Error>(fused_passes(&device, &gate, &up)))
        .unwrap();
    assert_eq!(shared, fused);
    assert_eq!(
        device.runtime().entries().get("decode_stack"),
        Some(&2),
        "each once for both passes"
    );
}

#[test]
fn a_library_is_asked_for_large_plain_products_alone() {
    let Some(device) = device() else { return };
    // Not computed: the emulation would take long. Whether a product is asked for is decided before.
    let untouched = |shape: [usize; 2]| {
        let buffer = device.inner.memory.take(shape[0] * shape[1] * 2).unwrap();
        Tensor::from_buffer(buffer, DType::BF16, shape.into())
    };
    let weight = Weight::Dense(untouched([8192, 8192]));
    let (x, mut y) = (untouched([8192, 8192]), untouched([8192, 8192]));
    let right = device.right(&weight, Precision::Bf16).unwrap();
    let mut product = super::matmul::Product {
        left: &x,
        right: &right,
        reads: super::matmul::Reads::Rows,
        second: None,
        bias: None,
        out: Some((&mut y, Write::Overwrite)),
        copy: None,
        sizes: [8192, 8192, 8192, 0],
    };
    assert!(!device.left_to_a_library(&product).unwrap(), "the emulation has none");
    let asked = device.runtime().plain_products();
    let expected = PlainForm {
        rows: 8192,
        columns: 8192,
        depth: 8192,
        reads_rows: true,
    };
    assert_eq!(asked, [expected]);
    let bias = device.zeros(DType::BF16, [8192]).unwrap();
    product.bias = Some(&bias);
    device.left_to_a_library(&product).unwrap();
    product.bias = None;
    product.sizes[0] = 16;
    device.left_to_a_library(&product).unwrap();
    assert_eq!(device.runtime().plain_products(), []);
}
