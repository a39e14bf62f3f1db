//! Memory, copies, and arguments outside the contract.

use brightrun_kernels::ops::{ActivationOps, Device, QuantizeOps};
use brightrun_kernels::{DType, Error};

use crate::on_every_backend;

#[test]
fn dropping_a_tensor_returns_its_bytes() {
    on_every_backend!("memory", [], |run| {
        let device = run.backend;
        let before = device.memory().in_use_bytes;
        let tensor = device.zeros(DType::F32, [1000]).unwrap();
        assert!(device.memory().in_use_bytes >= before + 4000);
        assert!(device.memory().peak_bytes >= device.memory().in_use_bytes);
        drop(tensor);
        assert_eq!(device.memory().in_use_bytes, before);
        device.reset_peak();
        assert_eq!(device.memory().peak_bytes, before);
        run.case("memory", 0);
    });
}

#[test]
fn copies_round_to_nearest_even_and_widen_exactly() {
    on_every_backend!("copy", [], |run| {
        let device = run.backend;
        // 1 + 2⁻⁸ lies between two bf16 values, and so does 1 + 3·2⁻⁸: the first goes down, the second up.
        let values = [
            1.0 + 0.003_906_25,
            1.0 + 3.0 * 0.003_906_25,
            -0.0,
            f32::INFINITY,
            3.4e38,
            1e-3,
        ];
        let source = device.upload_f32([values.len()], &values).unwrap();
        let mut halves = device.alloc(DType::BF16, [values.len()]).unwrap();
        device.copy(&source, &mut halves).unwrap();
        let mut back = device.alloc(DType::F32, [values.len()]).unwrap();
        device.copy(&halves, &mut back).unwrap();
        let expected: Vec<f64> = values
            .iter()
            .map(|v| f64::from(half::bf16::from_f32(*v).to_f32()))
            .collect();
        assert_eq!(expected[..2], [1.0, 1.015_625]);
        run.case("copy", 0).compare("back", &back, &expected, &expected);
    });
}

#[test]
fn a_tensor_is_written_and_read_piece_by_piece_within_its_bounds() {
    on_every_backend!("write_at", [], |run| {
        let device = run.backend;
        let mut tensor = device.zeros(DType::F32, [2, 2]).unwrap();
        device.write_at(&mut tensor, 6, &[1, 2, 3]).unwrap();
        device.write_at(&mut tensor, 15, &[9]).unwrap();
        assert_eq!(
            device.read(&tensor).unwrap(),
            [0, 0, 0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 0, 0, 0, 9]
        );
        let mut part = [0; 4];
        device.read_at(&tensor, 5, &mut part).unwrap();
        assert_eq!(part, [0, 1, 2, 3]);
        for first in [13, 17, usize::MAX] {
            assert!(matches!(
                device.write_at(&mut tensor, first, &part),
                Err(Error::Value { .. })
            ));
            assert!(matches!(
                device.read_at(&tensor, first, &mut part),
                Err(Error::Value { .. })
            ));
        }
        run.case("write_at", 0);
    });
}

#[test]
fn arguments_outside_the_contract_are_errors() {
    on_every_backend!("contract", [AddAssign, QuantizeNf4], |run| {
        let device = run.backend;
        let mut y = device.zeros(DType::F32, [2, 3]).unwrap();
        let wrong_shape = device.zeros(DType::F32, [3, 2]).unwrap();
        assert!(matches!(
            device.add_assign(&mut y, &wrong_shape),
            Err(Error::Shape { op: "add_assign", .. })
        ));
        let wrong_type = device.zeros(DType::I32, [2, 3]).unwrap();
        assert!(matches!(
            device.add_assign(&mut y, &wrong_type),
            Err(Error::DType { .. })
        ));
        assert!(matches!(device.write(&mut y, &[0; 23]), Err(Error::Value { .. })));
        for value in [f32::NAN, f32::INFINITY] {
            let source = device.upload_f32([1, 2], &[1.0, value]).unwrap();
            assert!(
                matches!(device.quantize_nf4(&source, false), Err(Error::Value { .. })),
                "{value}"
            );
        }
        run.case("contract", 0);
    });
}
