//! Embedding: `x[n] = table[token[n]]`.
//!
//! Backward: `dtable[token[n]] += dx[n]`, in the order of n.

use crate::Pool;
use crate::pool::Disjoint;
use crate::split::piece;

/// Rows one task looks up.
const TASK_ROWS: usize = 64;
/// Columns one task of the backward pass owns: it walks over all tokens, so that equal tokens are added in their order
/// whatever the number of threads. One cache line, so that tasks do not fight over lines.
const TASK_COLUMNS: usize = 16;

/// `x_nc[i] = table_vc[tokens_n[i]]`.
///
/// # Panics
/// If a token is not in the table.
pub fn embedding_forward(pool: &Pool, x_nc: &mut [f32], tokens_n: &[u32], table_vc: &[f32], c: usize) {
    check(x_nc, tokens_n, table_vc, c);
    let n = tokens_n.len();
    let x = Disjoint::new(x_nc);
    pool.run(n.div_ceil(TASK_ROWS), &|task| {
        let rows = piece(task, TASK_ROWS, n);
        // SAFETY: tasks have disjoint rows.
        let x = unsafe { x.slice(rows.start * c..rows.end * c) };
        for (x_c, &token) in x.chunks_exact_mut(c).zip(&tokens_n[rows]) {
            x_c.copy_from_slice(&table_vc[token as usize * c..][..c]);
        }
    });
}

/// Adds `table_tc[ids_n[i]]` to `x_nc[i]`: learned positions. Their backward is [`embedding_backward`].
///
/// # Panics
/// If an id is not in the table.
pub fn embedding_add(pool: &Pool, x_nc: &mut [f32], ids_n: &[u32], table_tc: &[f32], c: usize) {
    check(x_nc, ids_n, table_tc, c);
    pool.run_chunks(x_nc, TASK_ROWS * c, |task, x_nc| {
        for (x_c, &id) in x_nc.chunks_exact_mut(c).zip(&ids_n[task * TASK_ROWS..]) {
            x_c.iter_mut().zip(&table_tc[id as usize * c..][..c]).for_each(|(x, add)| *x += add);
        }
    });
}

/// Adds `dx_nc[i]` to `dtable_vc[tokens_n[i]]`.
///
/// # Panics
/// If a token is not in the table.
pub fn embedding_backward(pool: &Pool, dtable_vc: &mut [f32], dx_nc: &[f32], tokens_n: &[u32], c: usize) {
    check(dx_nc, tokens_n, dtable_vc, c);
    let dtable = Disjoint::new(dtable_vc);
    pool.run(c.div_ceil(TASK_COLUMNS), &|task| {
        let columns = piece(task, TASK_COLUMNS, c);
        for (dx_c, &token) in dx_nc.chunks_exact(c).zip(tokens_n) {
            let at = token as usize * c;
            // SAFETY: tasks have disjoint columns.
            let dtable = unsafe { dtable.slice(at + columns.start..at + columns.end) };
            dtable.iter_mut().zip(&dx_c[columns.clone()]).for_each(|(sum, dx)| *sum += dx);
        }
    });
}

fn check(x_nc: &[f32], tokens_n: &[u32], table_vc: &[f32], c: usize) {
    assert!(c > 0 && table_vc.len().is_multiple_of(c), "embedding: the table is not rows of {c}");
    assert_eq!(x_nc.len(), tokens_n.len() * c, "embedding: rows do not fit the tokens");
    let v = table_vc.len() / c;
    let largest = tokens_n.iter().max().map_or(0, |&token| token as usize + 1);
    assert!(largest <= v, "embedding: token {} in a table of {v}", largest.saturating_sub(1));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{every_pool, numbers};

    #[test]
    fn looks_up_rows_and_adds_gradients_in_order() {
        let (n, v, c) = (150, 7, 37);
        let tokens: Vec<u32> = (0..n as u32).map(|i| i * i % v as u32).collect();
        let (table, dx) = (numbers(1, v * c), numbers(2, n * c));
        let mut expected = numbers(3, v * c);
        for (i, &token) in tokens.iter().enumerate() {
            for j in 0..c {
                expected[token as usize * c + j] += dx[i * c + j];
            }
        }
        for pool in every_pool() {
            let mut x = vec![0.0; n * c];
            embedding_forward(&pool, &mut x, &tokens, &table, c);
            for (x_c, &token) in x.chunks(c).zip(&tokens) {
                assert_eq!(x_c, &table[token as usize * c..][..c]);
            }
            let doubled: Vec<f32> = x.iter().map(|x| x + x).collect();
            embedding_add(&pool, &mut x, &tokens, &table, c);
            assert_eq!(x, doubled);
            let mut dtable = numbers(3, v * c);
            embedding_backward(&pool, &mut dtable, &dx, &tokens, c);
            assert_eq!(dtable, expected);
        }
    }

    #[test]
    #[should_panic(expected = "token 3 in a table of 3")]
    fn a_token_outside_the_table_is_named() {
        embedding_forward(&Pool::new(1), &mut [0.0; 4], &[1, 3], &[0.0; 6], 2);
    }
}
