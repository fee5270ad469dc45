#include "planner/tables.h"

#include <fmt/format.h>

#include <charconv>
#include <cmath>
#include <map>

#include "planner/evaluate.h"
#include "planner/read.h"

namespace flash_mla::planner {
namespace {

// Where an expression's names come from: the article's sheets (A) or the exact ones (X), prefill (P) or
// decode (D), one request of 3,260 prompt tokens and 1,100 generated ones; the numbers are the EP degree. A0
// stops after the prompt (s' = 3,260), AP8 has TP 8, S is DeepSeek V3.2.
struct Cell {
  const char *section, *name, *printed, *unit, *context, *article, *exact_context, *exact, *note;
};

// An empty exact expression means that nothing was corrected: the article's own expression stands.
// An empty article expression means that the inputs are not known.
constexpr const char* kNoInputs = "the figures before and after are not in the reference";

const Cell kCells[] = {
    {"P", "embedding params", "0.93", "B", "XD8", "V*d/10^9", "", "", ""},
    {"P", "MLA params, 61 layers", "11.4", "B", "XD8", "L*P_mla/10^9", "", "", "without the RMSNorm vectors"},
    {"P", "dense FFN (row label \"前3层\")", "0.396", "B", "XD8", "P_ffn/10^9", "XD8", "L_d*P_ffn/10^9",
     "the printed number is one layer, the label says three"},
    {"P", "one MoE layer (257 experts)", "11.3", "B", "XD8", "(E + n_sh)*P_exp/10^9", "", "",
     "router not included"},
    {"P", "one expert", "0.044", "B", "XD8", "P_exp/10^9", "", "", ""},
    {"P", "671 ≈ 0.93·2+11.4+0.396+11.3·58", "671", "B", "XD8", "0.93*2 + 11.4 + 0.396 + 11.3*58", "XD8",
     "N_total/10^9", "the printed sum counts one dense layer of three and no router"},
    {"P", "Size_dense", "14", "B", "XD8", "671 - 657", "XD8", "N_dense/10^9", ""},
    {"P", "Size_MoE", "657", "B", "XD8", "(N_shared + N_routed)/10^9", "", "", ""},
    {"P", "active non-attention", "25.6", "B", "XD8", "37 - 11.4", "XD8", "N_active/10^9", ""},
    {"P", "18432/d", "2.57", "", "XD8", "d_ff/d", "", "", ""},

    {"T2", "prefill non-attn", "166912", "GFLOP", "AP1", "F_nonattn/10^9", "XP8", "2*N_active*b*s/10^9",
     "counts 10^9, not the 1024^3 of the printed formula"},
    {"T2", "prefill MHA", "26569", "GFLOP", "AP1", "F_mha/10^9", "", "", "26569 needs s' = 1631"},
    {"T2", "prefill subtotal", "193481", "GFLOP", "AP1", "166912 + 26569", "AP1", "166912 + F_mha/10^9", ""},
    {"T2", "prefill non-attn %", "86.3%", "", "AP1", "166912/193481*100", "", "", ""},
    {"T2", "prefill MHA %", "13.7%", "", "AP1", "26569/193481*100", "", "", ""},
    {"T2", "decode non-attn", "51.2", "GFLOP", "AD8", "F_nonattn/10^9", "XD8", "2*N_active*b/10^9", ""},
    {"T2", "decode MLA (s'=3810)", "65.1", "GFLOP", "AD8", "F_mla/10^9", "", "", "65.1 needs s' = 3832"},
    {"T2", "decode subtotal", "116.3", "GFLOP", "AD8", "51.2 + 65.1", "AD8", "51.2 + F_mla/10^9", ""},
    {"T2", "decode non-attn %", "44%", "", "AD8", "51.2/116.3*100", "", "", ""},
    {"T2", "decode MLA %", "56%", "", "AD8", "65.1/116.3*100", "", "", ""},

    {"T2x", "text: 116.3/296/1024*50*32", "0.614", "", "AD8", "116.3/296/1024*50*32", "AD8",
     "116.3/296/1000*50*32", "a utilisation, called seconds in the text"},

    {"F6", "weights per card TP1 EP8", "55", "GB", "AD8", "M_w", "XD8", "M_w/10^9",
     "shared expert on every card"},
    {"F6", "weights per card TP1 EP16", "34", "GB", "AD16", "M_w", "XD16", "M_w/10^9",
     "shared expert on every card"},
    {"F6", "weights per card TP1 EP32", "24.27", "GB", "AD32", "M_w", "XD32", "M_w/10^9",
     "shared expert on every card"},

    {"T3", "FP8 weights", "671", "GB", "XD8", "N_total/10^9", "", "", "all in FP8, without scales"},
    {"T3", "W4A8 weights", "342.5", "GB", "AD8", "(G_dense + G_moe/2)/10^9", "XD8",
     "(N_dense + (N_shared + N_routed)/2)/10^9", "without group scales"},
    {"T3", "KV cache s=3260", "0.112", "GiB", "AP1", "M_kv", "", "", "0.1119 is what 64 layers would give"},
    {"T3", "activation MLA (s'=3260)", "0.0008", "GiB", "AD0", "M_act", "", "", ""},
    {"T3", "activation MHA", "2.78", "GiB", "AP1", "M_act", "", "",
     "2.53 of it is a score matrix no fused kernel has"},

    {"T4", "R1 bytes", "352.5", "GB", "AP1", "14/8 + 657/257*9/2 + 0.11 + 2.78*61*2", "", "",
     "the activation term is not divided by TP although the weights are"},
    {"T4", "R1 time", "0.088", "s", "AP1", "(14/8 + 657/257*9/2 + 0.11 + 2.78*61*2)/4000", "", "", ""},
    {"T4", "R1 compute", "0.58", "s", "AP1", "(166.9 + 26.6/8)/296", "", "", ""},
    {"T4", "R1 ratio", "0.15", "", "AP1", "0.088/0.58", "", "", ""},
    {"T4", "R2 bytes", "25.7", "GB", "AD8", "14 + 657/257*9/2 + 0.11 + 0.0008*61*2", "", "", ""},
    {"T4", "R2 time", "0.0064", "s", "AD8", "(14 + 657/257*9/2 + 0.11 + 0.0008*61*2)/4000", "", "", ""},
    {"T4", "R2 compute", "0.000383", "s", "AD8", "116.3/296/1024", "AD8", "116.3/296/1000",
     "1 TFLOP taken as 1024 GFLOP"},
    {"T4", "R2 ratio", "16.7", "", "AD8", "0.0064/0.000383", "", "", ""},
    {"T4", "R3 bytes", "32.15", "GB", "AD8", "14 + 657/257*9/2 + 32*(0.11 + 0.0008*61*2)", "", "", ""},
    {"T4", "R3 time", "0.008", "s", "AD8", "(14 + 657/257*9/2 + 32*(0.11 + 0.0008*61*2))/4000", "", "", ""},
    {"T4", "R3 compute (32 requests)", "0.000383", "s", "AD8", "32*116.3/296/1024", "AD8",
     "32*116.3/296/1000", "the printed time is that of one request"},
    {"T4", "R3 ratio", "20.1", "", "AD8", "(14 + 657/257*9/2 + 32*(0.11 + 0.0008*61*2))/4000/0.000383", "AD8",
     "(14 + 657/257*9/2 + 32*(0.11 + 0.0008*61*2))/4000/(32*116.3/296/1024)", ""},

    {"C", "EP bytes per token", "0.012", "GiB", "AD8", "T_ep", "", "", ""},
    {"C", "TP bytes per token ×TP/(TP-1)", "0.00163", "GiB", "AD8", "L*2*b*d*2/GiB", "", "", ""},
    {"C", "EP8 32 tokens / 900", "0.0004", "s", "AD8", "0.012*32/900", "AD8", "T_ep*32/900", ""},
    {"C", "EP16 all inter-node / 50", "0.0077", "s", "AD8", "0.012*32/50", "AD8", "T_ep*32/50", ""},
    {"C", "EP16 half", "0.004", "s", "AD8", "0.012*32/2/900 + 0.012*32/2/50", "AD8",
     "T_ep*32/2/900 + T_ep*32/2/50", ""},
    {"C", "EP32 3/4 inter", "0.0059", "s", "AD8", "0.012*32/4/900 + 0.012*32*3/4/50", "AD8",
     "T_ep*32/4/900 + T_ep*32*3/4/50", ""},
    {"C", "TP16", "0.000547", "s", "AD8", "0.00163*32/900 + 0.00163*32*15/16/2/50", "", "",
     "the reference gives only the result; this expression was rebuilt from its digits"},
    {"C", "tokens per expert EP8 (32 per card)", "1", "", "XD8", "32*EP*k/E", "", "", ""},
    {"C", "tokens per expert EP16", "2", "", "XD16", "32*EP*k/E", "", "", ""},
    {"C", "tokens per expert EP32", "4", "", "XD32", "32*EP*k/E", "", "", ""},

    {"T5", "R1 bytes", "40.39", "GiB", "AP1", "T_total", "", "", ""},
    {"T5", "R1 time", "0.045", "s", "AP1", "40.39/900", "", "", ""},
    {"T5", "R1 compute", "0.16", "s", "AP1", "(166.9/8 + 26.6)/296", "", "", ""},
    {"T5", "R1 ratio", "0.28", "", "AP1", "0.045/0.16", "", "", ""},
    {"T5", "R2 TP bytes", "4.65", "GiB", "AP8", "T_tp", "", "", ""},
    {"T5", "R2 bytes", "45.04", "GiB", "AP8", "T_total", "", "", ""},
    {"T5", "R2 time", "0.05", "s", "AP8", "45.04/900", "", "", ""},
    {"T5", "R2 compute", "0.082", "s", "AP8", "(166.9 + 26.6)/8/296", "", "", ""},
    {"T5", "R2 ratio", "0.61", "", "AP8", "0.05/0.082", "", "", ""},
    {"T5", "R3 bytes", "0.012", "GiB", "AD8", "T_total", "", "", ""},
    {"T5", "R3 time", "0.000013", "s", "AD8", "0.012/900", "", "", ""},
    {"T5", "R3 compute", "0.00038", "s", "AD8", "116.3/296/1024", "", "", ""},
    {"T5", "R3 ratio", "0.034", "", "AD8", "0.000013/0.00038", "", "", ""},

    {"T6", "TP1 TFLOP/card", "47.5", "TFLOP", "AP1", "166.9/8 + 26.6", "", "", ""},
    {"T6", "TP1 time", "0.16", "s", "AP1", "(166.9/8 + 26.6)/296", "", "", ""},
    {"T6", "TP1 bytes", "40.39", "GiB", "AP1", "T_total", "", "", ""},
    {"T6", "TP1 comm time", "0.045", "s", "AP1", "40.39/900", "", "", ""},
    {"T6", "TP8 TFLOP/card", "24", "TFLOP", "AP8", "(166.9 + 26.6)/8", "", "", ""},
    {"T6", "TP8 time", "0.082", "s", "AP8", "(166.9 + 26.6)/8/296", "", "", ""},
    {"T6", "TP8 bytes", "45.04", "GiB", "AP8", "T_total", "", "", "the article cites formula 27; it is 26"},
    {"T6", "TP8 comm time", "0.05", "s", "AP8", "45.04/900", "", "", ""},
    {"T6", "extra comm TP8-TP1", "0.005", "s", "AP8", "4.65/900", "", "", ""},
    {"T6", "saved compute", "0.08", "s", "AP8", "(166.9/8 + 26.6)/296 - (166.9 + 26.6)/8/296", "", "", ""},

    {"T8", "R1 memory", "65", "GB", "AD8", "55 + 0.11 + 0.0008 + 10", "AD0", "M_w + M_kv + 0.0008 + 10", ""},
    {"T8", "R1 bytes moved", "16.56", "GB", "AD8", "14 + 657/257/2*(1 + 8/8) + 0.11 + 0.0008*61*2", "", "",
     "16.556 is the weight term alone"},
    {"T8", "R1 comm", "0.012", "GiB", "AD8", "T_ep", "", "", ""},
    {"T8", "R1 FLOP (cell)", "116", "GFLOP", "AD8", "65.1 + 51.2/8", "AD8", "65.1 + 51.2",
     "the cell contradicts its own derivation, 71.5; 116.3 holds when every rank has a request"},
    {"T8", "R1 FLOP (derivation 5)", "71.5", "GFLOP", "AD8", "65.1 + 51.2/8", "AD8", "65.1 + 51.2", ""},
    {"T8", "R2 memory", "68.5", "GB", "AD8", "55 + 0.11*32 + 0.0008*32 + 10", "AD0",
     "M_w + M_kv*32 + 0.0008*32 + 10", ""},
    {"T8", "R2 bytes moved", "23.2", "GB", "AD8", "14 + 657/257/2*(1 + 8/8) + 32*(0.11 + 0.0008*61*2)", "",
     "", ""},
    {"T8", "R2-4 comm", "0.383", "GiB", "AD8", "0.012*32", "AD8", "T_ep*32", ""},
    {"T8", "R2 FLOP", "2288", "GFLOP", "AD8", "32*(65.1 + 51.2/8)", "AD8", "32*(65.1 + 51.2)",
     "the other cards' tokens arrive too"},
    {"T8", "R3 memory", "47.5", "GB", "AD16", "34 + 0.11*32 + 0.0008*32 + 10", "AD16",
     "M_w + 0.11*32 + 0.0008*32 + 10", "34 should be 34.53"},
    {"T8", "R3 bytes moved", "22.56", "GB", "AD16", "14 + 657/257/2*(1 + 8/16) + 32*(0.11 + 0.0008*61*2)", "",
     "", ""},
    {"T8", "R3 FLOP", "2185.6", "GFLOP", "AD16", "32*(65.1 + 51.2/16)", "AD16", "32*(65.1 + 51.2)", ""},
    {"T8", "R4 memory", "37.8", "GB", "AD32", "24.27 + 0.11*32 + 0.0008*32 + 10", "", "", ""},
    {"T8", "R4 bytes moved", "22.24", "GB", "AD32", "14 + 657/257/2*(1 + 8/32) + 32*(0.11 + 0.0008*61*2)", "",
     "", ""},
    {"T8", "R4 FLOP", "2134.4", "GFLOP", "AD32", "32*(65.1 + 51.2/32)", "AD32", "32*(65.1 + 51.2)", ""},

    {"T9", "EP8 memory time", "0.0058", "s", "AD8", "23.2/4000", "", "", ""},
    {"T9", "EP8 compute time", "0.0075", "s", "AD8", "2288/296/1024", "AD8", "2288/296/1000", ""},
    {"T9", "EP8 total", "0.0137", "s", "AD8", "0.0058 + 0.0075 + 0.0004", "", "", ""},
    {"T9", "EP16 memory time", "0.00564", "s", "AD16", "22.56/4000", "", "", ""},
    {"T9", "EP16 compute time", "0.0072", "s", "AD16", "2185.6/296/1024", "AD16", "2185.6/296/1000", ""},
    {"T9", "EP16 total", "0.0168", "s", "AD16", "0.00564 + 0.0072 + 0.004", "", "", ""},
    {"T9", "EP32 memory time", "0.00556", "s", "AD32", "22.24/4000", "", "", ""},
    {"T9", "EP32 compute time", "0.007", "s", "AD32", "2134.4/296/1024", "AD32", "2134.4/296/1000", ""},
    {"T9", "EP32 total", "0.0185", "s", "AD32", "0.00556 + 0.007 + 0.0059", "", "", ""},

    {"D", "dense MLA read 128000×512", "65.5", "M elem", "S", "128000*d_c/10^6", "S",
     "128000*(d_c + d_R)/10^6", ""},
    {"D", "DSA index read", "16.3", "M elem", "S", "128000*d_I/10^6", "", "", "truncated"},
    {"D", "DSA sparse read", "1.0", "M elem", "S", "K_I*d_c/10^6", "S", "K_I*(d_c + d_R)/10^6", ""},
    {"D", "DSA total", "17.3", "M elem", "S", "(128000*d_I + K_I*d_c)/10^6", "S",
     "(128000*d_I + K_I*(d_c + d_R))/10^6", ""},
    {"D", "DSA / MLA", "26.4%", "%", "S", "(128000*d_I + K_I*d_c)/(128000*d_c)*100", "S",
     "(128000*d_I + K_I*(d_c + d_R))/(128000*(d_c + d_R))*100", ""},
    {"D", "reduction", "73.6%", "%", "S", "100 - (128000*d_I + K_I*d_c)/(128000*d_c)*100", "S",
     "100 - (128000*d_I + K_I*(d_c + d_R))/(128000*(d_c + d_R))*100", ""},
    {"D", "indexer bytes per token", "8192", "B", "S", "d_I + 4", "", "",
     "one key shared by all index heads: 128 FP8 values and a scale"},
    {"D", "s/k at 128K", "64", "", "S", "131072/K_I", "S", "128000/K_I", ""},

    {"M", "mHC temp. activation at 128K", "3.42", "GiB", "S", "2*4*d*128000/1024^3", "S",
     "2*4*d*128000*2/1024^3", "3.42 is one path of two at one byte; the streams are BF16"},

    {"S0", "42→ms/token", "23.8", "", "S", "1000/42", "", "", ""},
    {"S0", "78→ms/token", "12.8", "", "S", "1000/78", "", "", ""},
    {"S0", "121→ms/token", "8.3", "", "S", "1000/121", "", "", ""},
    {"S0", "success rate +", "19.5%", "", "S", "", "", "", kNoInputs},
    {"S0", "P99", "50.6%", "", "S", "", "", "", kNoInputs},
    {"S0", "power", "11%", "", "S", "", "", "", kNoInputs},
    {"S0", "servers", "33%", "", "S", "", "", "", kNoInputs},
    {"S0", "node throughput", "77%", "", "S", "", "", "", kNoInputs},
    {"S0", "electricity", "29%", "", "S", "", "", "", kNoInputs},
    {"S0", "racks", "37.5%", "", "S", "", "", "", kNoInputs},
    {"S0", "price 1", "38.6%", "", "S", "", "", "", kNoInputs},
    {"S0", "price 2", "37.5%", "", "S", "", "", "", kNoInputs},
    {"S0", "price 3", "38.5%", "", "S", "", "", "", kNoInputs},

    {"S1", "MLA KV reduction", "93.3%", "", "S", "100*(1 - 60*576*6/(95*8*128*2*16))", "", "",
     "DeepSeek-V2 with a 6-bit cache against DeepSeek-67B with grouped queries and 16 bits"},
};

Values context(const std::string& name) {
  Request q;
  const bool sparse = name == "S";
  q.model = find_model(sparse ? "deepseek-v3.2" : "deepseek-v3", "model");
  q.hardware = find_hardware("h20", "hardware");
  q.mode = name[0] == 'A' ? Mode::kArticle : Mode::kExact;
  q.precision = {"fp8", "fp8", "w4a8", "fp8_576", "fp8", 0};
  q.workload.batch = 1;
  Plan p{1, 8, 8, 1, 1};
  if (name == "AP8") {
    p = {8, 8, 1, 1, 1};
  } else if (name == "AD0") {
    q.workload.output = 0;
  } else if (name.ends_with("16")) {
    p.ep = p.dp = 16;
  } else if (name.ends_with("32")) {
    p.ep = p.dp = 32;
  }
  q.prefill_plan = q.decode_plan = p;
  return evaluate_sheet(q, !sparse && name[1] == 'P' ? PhaseKind::kPrefill : PhaseKind::kDecode);
}

}  // namespace

std::string verdict(const std::string& printed, double value) {
  double shown = 0;
  const auto [end, error] = std::from_chars(printed.data(), printed.data() + printed.size(), shown);
  (void)error;
  const std::string digits(printed.data(), end);
  const std::size_t point = digits.find('.');
  const double unit =
      point == std::string::npos ? 1 : std::pow(10.0, -static_cast<double>(digits.size() - point - 1));
  if (std::abs(value - shown) <= unit / 2 * (1 + 1e-9)) return "match";
  return std::abs(shown / value - 1) <= 0.0101 ? "near" : "MISMATCH";
}

std::vector<TableCell> article_tables() {
  std::map<std::string, Values> contexts;
  auto in = [&](const char* name) -> const Values& {
    return contexts.try_emplace(name, Values(context(name))).first->second;
  };
  std::vector<TableCell> cells;
  for (const Cell& c : kCells) {
    TableCell out{c.section, c.name, c.printed, c.unit, c.note, c.article,
                  "",        {},     "",        "",     {},     "inputs unknown"};
    if (!out.article_text.empty()) {
      const Values& v = in(c.context);
      out.article = v.sheet().evaluate(c.article, v.all());
      out.article_substituted = v.sheet().substitute(c.article, v.all());
      out.verdict = verdict(c.printed, *out.article);
      const bool corrected = *c.exact != '\0';
      const Values& x = in(corrected ? c.exact_context : c.context);
      out.exact_text = corrected ? c.exact : c.article;
      out.exact = x.sheet().evaluate(out.exact_text, x.all());
      out.exact_substituted = x.sheet().substitute(out.exact_text, x.all());
    }
    cells.push_back(std::move(out));
  }
  return cells;
}

}  // namespace flash_mla::planner
